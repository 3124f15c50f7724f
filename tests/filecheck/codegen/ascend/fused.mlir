// RUN: sagellm opt %s --split-input-file -p kernel-fusion --target ascend --emit code | filecheck %s
// RUN: sagellm opt %s --split-input-file -p kernel-fusion --target ascend:910C --emit code | filecheck %s --check-prefix A3
// RUN: sagellm opt %s --split-input-file -p kernel-fusion --target ascend:950 --emit code | filecheck %s --check-prefix A5
// RUN: sagellm opt %s --split-input-file -p kernel-fusion --target ascend:310P --emit code | filecheck %s --check-prefix P

// What each chip has one call for. A product and its sum are one for prompts alone, among 2, 4 or 8 ranks.

// CHECK: def quantized(w, x, y):
// CHECK-NEXT: values, _, x_2, scales, _ = torch.ops.npu.npu_add_rms_norm_dynamic_quant(
// CHECK-NEXT:     x, y, w.norm, epsilon=1.0e-06, output_mask=[True, False])
// CHECK: def alone(x):
// CHECK-NEXT: values, scales = torch.ops.npu.npu_dynamic_quant(x)
// CHECK: def prompts(w, comm, x, rows):
// CHECK-NEXT: sum = torch.ops.npu.npu_mm_all_reduce_base(x, w.o_proj.t(), comm.group_name)
// CHECK: def decodes(w, comm, x, rows):
// CHECK-NEXT: sum = comm.all_reduce(F.linear(x, w.o_proj))
// CHECK: def sample(logits, how):
// CHECK-NEXT: logits_2 = ascend.top_k_top_p(logits, how)
// CHECK: def three(w, comm, x, rows):
// CHECK-NEXT: sum = comm.all_reduce(F.linear(x, w.o_proj))

// A3: npu_add_rms_norm_dynamic_quant
// A3: npu_dynamic_quant
// A3: def prompts(w, comm, x, rows):
// A3-NEXT: o = F.linear(x, w.o_proj)
// A3-NEXT: sum = comm.all_reduce(o)
// A3: ascend.top_k_top_p(logits, how)

// A5: npu_add_rms_norm_dynamic_quant
// A5: npu_dynamic_quant
// A5: def prompts(w, comm, x, rows):
// A5-NEXT: o = F.linear(x, w.o_proj)
// A5: sampling.top_k(logits, how.top_k)
// A5-NEXT: sampling.top_p(

// P: npu_add_rms_norm(
// P-NEXT: aten.quantize(
// P: aten.quantize(x)
// P: o = F.linear(x, w.o_proj)
// P: sampling.top_k(logits, how.top_k)

builtin.module {
  nn.func @quantized(%x: tensor<?x64xf16>, %y: tensor<?x64xf16>) -> (tensor<?x64xf16>, tensor<?x64xi8>, tensor<?xf32>) {
    %x_1 = nn.add %x, %y : tensor<?x64xf16>
    %h = nn.rms_norm %x_1, @norm {eps = 1.0e-06} : tensor<?x64xf16>
    %values, %scales = nn.quantize %h : tensor<?x64xi8>, tensor<?xf32>
    nn.return %x_1, %values, %scales
  }
  nn.func @alone(%x: tensor<?x64xf16>) -> (tensor<?x64xi8>, tensor<?xf32>) {
    %values, %scales = nn.quantize %x : tensor<?x64xi8>, tensor<?xf32>
    nn.return %values, %scales
  }
  nn.func @prompts(%x: tensor<?x64xf16>, %rows: !batch.rows<decode, prefill>) -> tensor<?x64xf16> {
    %o = nn.linear %x, @o_proj : tensor<?x64xf16>
    %sum = comm.all_reduce %o {group = tp} : tensor<?x64xf16>
    nn.return %sum
  }
  nn.func @decodes(%x: tensor<?x64xf16>, %rows: !batch.rows<decode>) -> tensor<?x64xf16> {
    %o = nn.linear %x, @o_proj : tensor<?x64xf16>
    %sum = comm.all_reduce %o {group = tp} : tensor<?x64xf16>
    nn.return %sum
  }
  nn.func @sample(%logits: tensor<?x32xf32>, %how: !batch.sampling<draw, top_k, top_p>) -> tensor<?xi64> {
    %logits_1 = nn.top_k %logits, %how : tensor<?x32xf32>
    %logits_2 = nn.top_p %logits_1, %how : tensor<?x32xf32>
    %tokens = nn.draw %logits_2, %how : tensor<?xi64>
    nn.return %tokens
  }
  weights.load @load.prompts layers 0 to 1 {
    %o_proj = weights.tensor {dim = 1, parts = 2, source = "o"} : tensor<64x64xf16>
    weights.store %o_proj, @o_proj
  }
}

// -----
builtin.module {
  nn.func @three(%x: tensor<?x64xf16>, %rows: !batch.rows<prefill>) -> tensor<?x64xf16> {
    %o = nn.linear %x, @o_proj : tensor<?x64xf16>
    %sum = comm.all_reduce %o {group = tp} : tensor<?x64xf16>
    nn.return %sum
  }
  weights.load @load.three layers 0 to 1 {
    %o_proj = weights.tensor {dim = 1, parts = 3, source = "o"} : tensor<64x64xf16>
    weights.store %o_proj, @o_proj
  }
}
