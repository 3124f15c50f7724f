// RUN: sagellm opt %s --emit code | filecheck %s
// RUN: sagellm opt %s -p kernel-fusion --emit code | filecheck %s --check-prefix FUSED

// Quantised tokens, behind the norm or together with it.

// CHECK: def layer(w, x, y):
// CHECK-NEXT: x_2, h = {{native|aten}}.add_rms_norm(x, y, w.norm, 1.0e-06)
// CHECK-NEXT: values, scales = aten.quantize(h)
// FUSED: def layer(w, x, y):
// FUSED-NEXT: x_2, values, scales = aten.add_rms_norm_quantize({{native|aten}}.add_rms_norm, x, y, w.norm, 1.0e-06)
// FUSED: def first(w, x):
// FUSED-NEXT: values, scales = aten.rms_norm_quantize({{native|aten}}.rms_norm, x, w.norm, 1.0e-06)

builtin.module {
  nn.func @layer(%x: tensor<?x8xbf16>, %y: tensor<?x8xbf16>) -> (tensor<?x8xbf16>, tensor<?x8xi8>, tensor<?xf32>) {
    %x_1, %h = nn.add_rms_norm %x, %y, @norm {eps = 1.0e-06} : tensor<?x8xbf16>, tensor<?x8xbf16>
    %values, %scales = nn.quantize %h : tensor<?x8xi8>, tensor<?xf32>
    nn.return %x_1, %values, %scales
  }
  nn.func @first(%x: tensor<?x8xbf16>) -> (tensor<?x8xi8>, tensor<?xf32>) {
    %h = nn.rms_norm %x, @norm {eps = 1.0e-06} : tensor<?x8xbf16>
    %values, %scales = nn.quantize %h : tensor<?x8xi8>, tensor<?xf32>
    nn.return %values, %scales
  }
}
