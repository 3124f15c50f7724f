// RUN: sagellm opt %s --split-input-file --target dcu+kernels --emit code | filecheck %s

// A kernel that writes over its operands does so where nobody reads their old values, else over copies.

// The caller of @layer is not known, so that x may not be written over; y is the layer's own.
// CHECK: x_2, h = x.clone(memory_format=torch.contiguous_format), up
// CHECK-NEXT: lightop.norm.fused_add_rms_norm(h, x_2, w.norm, 1.0e-06)
nn.func @layer(%x: tensor<?x64xbf16>, %y: tensor<?x64xbf16>) -> (tensor<?x64xbf16>, tensor<?x64xbf16>) {
  %up = nn.linear %y, @up : tensor<?x64xbf16>
  %x_1, %h = nn.add_rms_norm %x, %up, @norm {eps = 1.0e-06} : tensor<?x64xbf16>, tensor<?x64xbf16>
  nn.return %x_1, %h
}
// -----
// Read later, whole or in part; and both operands one.
// CHECK: x_2, h = x.clone(memory_format=torch.contiguous_format), up
// CHECK: x_3, h_2 = wide.clone(memory_format=torch.contiguous_format), x_2
// CHECK: x_4, h_3 = h.clone(memory_format=torch.contiguous_format), h.clone(memory_format=torch.contiguous_format)
nn.func @layer(%y: tensor<?x64xbf16>) -> (tensor<?x64xbf16>, tensor<?x64xbf16>, tensor<?x64xbf16>) {
  %x = nn.linear %y, @down : tensor<?x64xbf16>
  %up = nn.linear %y, @up : tensor<?x64xbf16>
  %wide = nn.linear %y, @wide : tensor<?x64xbf16>
  %part, %rest = nn.split %wide {sizes = [32, 32]} : tensor<?x32xbf16>, tensor<?x32xbf16>
  %x_1, %h = nn.add_rms_norm %x, %up, @norm {eps = 1.0e-06} : tensor<?x64xbf16>, tensor<?x64xbf16>
  %x_2, %h_1 = nn.add_rms_norm %wide, %x_1, @norm {eps = 1.0e-06} : tensor<?x64xbf16>, tensor<?x64xbf16>
  %x_3, %h_2 = nn.add_rms_norm %h, %h, @norm {eps = 1.0e-06} : tensor<?x64xbf16>, tensor<?x64xbf16>
  %sum = nn.add %x, %h_2 : tensor<?x64xbf16>
  %m = nn.mul %part, %rest : tensor<?x32xbf16>
  nn.return %sum, %h_1, %x_3
}
// -----
// What goes from layer to layer is replaced; what every layer gets is not.
// CHECK: def layers(w, x, h, same):
// CHECK-NEXT: x_2, h_2 = x, h
// CHECK: x_3, h_3 = same.clone(memory_format=torch.contiguous_format), h_2
nn.func @model(%y: tensor<?x64xbf16>) -> tensor<?x64xbf16> {
  %x, %h = nn.call %y, @begin : tensor<?x64xbf16>, tensor<?x64xbf16>
  %same = nn.call %y, @other : tensor<?x64xbf16>
  %x_1, %h_1 = nn.repeat %x, %h, %same, @layers {count = 2, first = 0} : tensor<?x64xbf16>, tensor<?x64xbf16>
  nn.return %h_1
}
nn.func @begin(%y: tensor<?x64xbf16>) -> (tensor<?x64xbf16>, tensor<?x64xbf16>) {
  %x = nn.linear %y, @up : tensor<?x64xbf16>
  %h = nn.linear %y, @down : tensor<?x64xbf16>
  nn.return %x, %h
}
nn.func @other(%y: tensor<?x64xbf16>) -> tensor<?x64xbf16> {
  %same = nn.linear %y, @up : tensor<?x64xbf16>
  nn.return %same
}
nn.func @layers(%x: tensor<?x64xbf16>, %h: tensor<?x64xbf16>, %same: tensor<?x64xbf16>) -> (tensor<?x64xbf16>, tensor<?x64xbf16>) {
  %x_1, %h_1 = nn.add_rms_norm %x, %h, @norm {eps = 1.0e-06} : tensor<?x64xbf16>, tensor<?x64xbf16>
  %x_2, %h_2 = nn.add_rms_norm %same, %h_1, @norm {eps = 1.0e-06} : tensor<?x64xbf16>, tensor<?x64xbf16>
  %up = nn.linear %x_1, @up : tensor<?x64xbf16>
  nn.return %up, %h_2
}
