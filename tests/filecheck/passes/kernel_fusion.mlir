// RUN: sagellm opt %s --split-input-file -p kernel-fusion --remarks | filecheck %s
// RUN: sagellm opt %s --split-input-file -p kernel-fusion --remarks --without nn.split \
// RUN:     | filecheck %s --check-prefix NO-SPLIT
// RUN: sagellm opt %s --split-input-file -p kernel-fusion --remarks --without nn.silu_mul \
// RUN:     --without nn.add_rms_norm --without nn.rope_kv_write | filecheck %s --check-prefix NO-FUSED

// RUN: sagellm opt %s --split-input-file -p kernel-fusion --remarks --target ascend | filecheck %s --check-prefix ASCEND

// A whole layer: q, k and v are one product with one bias, gate and up one, and the weights program joins them.

// CHECK: // kernel-fusion: applied at %q = nn.linear (operation 3 of @layer): @q_proj + @k_proj + @v_proj -> @qkv_proj: one product of 16 columns for 3
// CHECK-NEXT: // kernel-fusion: applied at nn.kv_write (operation 4 of @layer): rope + kv_write -> rope_kv_write
// CHECK-NEXT: // kernel-fusion: applied at {{.*}}: add + rms_norm -> add_rms_norm
// CHECK-NEXT: // kernel-fusion: applied at {{.*}}: @gate_proj + @up_proj -> @gate_up_proj: one product of 32 columns for 2
// CHECK-NEXT: // kernel-fusion: applied at {{.*}}: split + silu + mul -> silu_mul
// CHECK: nn.func @layer
// CHECK-NEXT: %qkv = nn.linear %h, @qkv_proj {bias = @qkv_bias} : tensor<?x16xf32>
// CHECK-NEXT: %q, %k, %v = nn.split %qkv {sizes = [8, 4, 4]} : tensor<?x8xf32>, tensor<?x4xf32>, tensor<?x4xf32>
// CHECK-NEXT: %q_1 = nn.rope_kv_write %q, %k, %v, %angles, %rows {head_dim = 4} : tensor<?x8xf32>
// CHECK-NEXT: nn.attention %q_1, %rows
// CHECK: %x_1, %h_1 = nn.add_rms_norm %x, %attn, @mlp_norm {eps = 1.0e-06} : tensor<?x8xf32>, tensor<?x8xf32>
// CHECK-NEXT: %gate_up = nn.linear %h_1, @gate_up_proj : tensor<?x32xf32>
// CHECK-NEXT: %m = nn.silu_mul %gate_up : tensor<?x16xf32>
// CHECK-NEXT: nn.return %x_1, %m
// CHECK: weights.load @load.layer layers 0 to 2
// CHECK: %qkv_proj = weights.concat %q_proj, %k_proj, %v_proj : tensor<16x8xf32>
// CHECK-NEXT: weights.store %qkv_proj, @qkv_proj
// CHECK: %qkv_bias = weights.concat %q_bias, %k_bias, %v_bias : tensor<16xf32>
// CHECK: %gate_up_proj = weights.concat %gate_proj, %up_proj : tensor<32x8xf32>
// CHECK-NOT: weights.store %q_proj

// Without nn.split there is nothing to cut the joint product with.
// NO-SPLIT: declined at %q = nn.linear (operation 1 of @layer): @q_proj + @k_proj + @v_proj: cpu has no nn.split
// NO-SPLIT: declined at %gate = nn.linear (operation 7 of @layer): @gate_proj + @up_proj: cpu has no nn.split
// NO-SPLIT: declined at %m = nn.mul (operation 10 of @layer): gate and up are not the halves of one product
// NO-SPLIT: %q = nn.linear %h, @q_proj {bias = @q_bias} : tensor<?x8xf32>
// NO-SPLIT: nn.silu

// NO-FUSED: declined at nn.kv_write (operation 4 of @layer): cpu has no nn.rope_kv_write
// NO-FUSED: declined at %h = nn.rms_norm (operation 7 of @layer): cpu has no nn.add_rms_norm
// NO-FUSED: declined at %m = nn.mul (operation 11 of @layer): cpu has no nn.silu_mul
// NO-FUSED: nn.rope
// NO-FUSED-NEXT: nn.kv_write
// NO-FUSED: %x_1 = nn.add
// NO-FUSED: %h_1 = nn.rms_norm
// NO-FUSED: nn.split
// NO-FUSED: nn.silu
// NO-FUSED: nn.mul

builtin.module {
  nn.func @layer(%x: tensor<?x8xf32>, %h: tensor<?x8xf32>, %angles: tensor<?x4xf32>, %rows: !batch.rows<decode>) -> (tensor<?x8xf32>, tensor<?x16xf32>) {
    %q = nn.linear %h, @q_proj {bias = @q_bias} : tensor<?x8xf32>
    %k = nn.linear %h, @k_proj {bias = @k_bias} : tensor<?x4xf32>
    %v = nn.linear %h, @v_proj {bias = @v_bias} : tensor<?x4xf32>
    %q_1, %k_1 = nn.rope %q, %k, %angles {head_dim = 4} : tensor<?x8xf32>, tensor<?x4xf32>
    nn.kv_write %k_1, %v, %rows {head_dim = 4}
    %attn = nn.attention %q_1, %rows {head_dim = 4, kv_heads = 1, scale = 0.5} : tensor<?x8xf32>
    %x_1 = nn.add %x, %attn : tensor<?x8xf32>
    %h_1 = nn.rms_norm %x_1, @mlp_norm {eps = 1.0e-06} : tensor<?x8xf32>
    %gate = nn.linear %h_1, @gate_proj : tensor<?x16xf32>
    %up = nn.linear %h_1, @up_proj : tensor<?x16xf32>
    %act = nn.silu %gate : tensor<?x16xf32>
    %m = nn.mul %act, %up : tensor<?x16xf32>
    nn.return %x_1, %m
  }
  weights.load @load.layer layers 0 to 2 {
    %q_proj = weights.tensor {source = "layers.{layer}.q_proj.weight"} : tensor<8x8xf32>
    weights.store %q_proj, @q_proj
    %q_bias = weights.tensor {source = "layers.{layer}.q_proj.bias"} : tensor<8xf32>
    weights.store %q_bias, @q_bias
    %k_proj = weights.tensor {source = "layers.{layer}.k_proj.weight"} : tensor<4x8xf32>
    weights.store %k_proj, @k_proj
    %k_bias = weights.tensor {source = "layers.{layer}.k_proj.bias"} : tensor<4xf32>
    weights.store %k_bias, @k_bias
    %v_proj = weights.tensor {source = "layers.{layer}.v_proj.weight"} : tensor<4x8xf32>
    weights.store %v_proj, @v_proj
    %v_bias = weights.tensor {source = "layers.{layer}.v_proj.bias"} : tensor<4xf32>
    weights.store %v_bias, @v_bias
    %mlp_norm = weights.tensor {source = "layers.{layer}.norm.weight"} : tensor<8xf32>
    weights.store %mlp_norm, @mlp_norm
    %gate_proj = weights.tensor {source = "layers.{layer}.gate_proj.weight"} : tensor<16x8xf32>
    weights.store %gate_proj, @gate_proj
    %up_proj = weights.tensor {source = "layers.{layer}.up_proj.weight"} : tensor<16x8xf32>
    weights.store %up_proj, @up_proj
  }
}

// -----
// Only one of the two has a bias.

// CHECK: // kernel-fusion: declined at %q = nn.linear (operation 1 of @one_bias): @q_proj + @k_proj: some have a bias and some have none
// CHECK: %q = nn.linear %h, @q_proj {bias = @q_bias} : tensor<?x8xf32>
// CHECK-NEXT: %k = nn.linear %h, @k_proj : tensor<?x8xf32>

builtin.module {
  nn.func @one_bias(%h: tensor<?x8xf32>) -> (tensor<?x8xf32>, tensor<?x8xf32>) {
    %q = nn.linear %h, @q_proj {bias = @q_bias} : tensor<?x8xf32>
    %k = nn.linear %h, @k_proj : tensor<?x8xf32>
    nn.return %q, %k
  }
}

// -----
// A matrix that is used a second time cannot become part of another; one that is not a plain tensor of the checkpoint cannot be joined.

// CHECK: declined at %q = nn.linear (operation 1 of @twice): @q_proj + @q_proj: @q_proj is used 2 times
// CHECK: declined at %q = nn.linear (operation 1 of @nowhere): @q_proj + @k_proj: the module has no weights program for @nowhere
// CHECK: declined at %q = nn.linear (operation 1 of @packed): @q_proj + @k_proj: @q_proj is computed, not a tensor of the checkpoint
// CHECK-NOT: nn.split

builtin.module {
  nn.func @twice(%h: tensor<?x8xf32>) -> (tensor<?x8xf32>, tensor<?x8xf32>) {
    %q = nn.linear %h, @q_proj : tensor<?x8xf32>
    %k = nn.linear %h, @q_proj : tensor<?x8xf32>
    nn.return %q, %k
  }
  nn.func @nowhere(%h: tensor<?x8xf32>) -> (tensor<?x8xf32>, tensor<?x8xf32>) {
    %q = nn.linear %h, @q_proj : tensor<?x8xf32>
    %k = nn.linear %h, @k_proj : tensor<?x8xf32>
    nn.return %q, %k
  }
  nn.func @packed(%h: tensor<?x8xf32>) -> (tensor<?x8xf32>, tensor<?x8xf32>) {
    %q = nn.linear %h, @q_proj : tensor<?x8xf32>
    %k = nn.linear %h, @k_proj : tensor<?x8xf32>
    nn.return %q, %k
  }
  weights.load @load.twice layers 0 to 1 {
    %q_proj = weights.tensor {source = "q_proj.weight"} : tensor<8x8xf32>
    weights.store %q_proj, @q_proj
  }
  weights.load @load.packed layers 0 to 1 {
    %q_proj = weights.tensor {source = "q_proj.weight"} : tensor<8x8xf32>
    %q_packed = weights.pack %q_proj {layout = blocked} : tensor<8x8xf32>
    weights.store %q_packed, @q_proj
    %k_proj = weights.tensor {source = "k_proj.weight"} : tensor<8x8xf32>
    weights.store %k_proj, @k_proj
  }
}

// -----
// silu * up where the two are not the halves of one product, and where silu is wanted elsewhere too.

// CHECK: declined at %m = nn.mul (operation 2 of @two_inputs): gate and up are not the halves of one product
// CHECK: nn.func @two_inputs
// CHECK-NEXT: nn.silu
// CHECK-NEXT: nn.mul
// CHECK: nn.func @wanted
// CHECK: nn.silu
// CHECK-NEXT: nn.mul

builtin.module {
  nn.func @two_inputs(%gate: tensor<?x16xf32>, %up: tensor<?x16xf32>) -> tensor<?x16xf32> {
    %act = nn.silu %gate : tensor<?x16xf32>
    %m = nn.mul %act, %up : tensor<?x16xf32>
    nn.return %m
  }
  nn.func @wanted(%x: tensor<?x32xf32>) -> (tensor<?x16xf32>, tensor<?x16xf32>) {
    %gate, %up = nn.split %x {sizes = [16, 16]} : tensor<?x16xf32>, tensor<?x16xf32>
    %act = nn.silu %gate : tensor<?x16xf32>
    %m = nn.mul %act, %up : tensor<?x16xf32>
    nn.return %act, %m
  }
}

// -----
// The norm of each head is another operation than the norm of the residual stream.

// CHECK: nn.func @heads
// CHECK: nn.add
// CHECK-NEXT: nn.rms_norm {{.*}}heads = 2

builtin.module {
  nn.func @heads(%x: tensor<?x8xf32>, %y: tensor<?x8xf32>) -> tensor<?x8xf32> {
    %s = nn.add %x, %y : tensor<?x8xf32>
    %h = nn.rms_norm %s, @q_norm {eps = 1.0e-06, heads = 2} : tensor<?x8xf32>
    nn.return %h
  }
}

// -----
// The norms of q's and k's heads go with the rotation, unless something else reads one, or they differ; rotated keys
// that are read elsewhere stay.

// CHECK: applied at nn.kv_write (operation 4 of @normed): q and k norm + rope + kv_write -> rope_kv_write
// CHECK-NEXT: applied at nn.kv_write (operation 4 of @other_eps): rope + kv_write -> rope_kv_write
// CHECK-NEXT: declined at nn.kv_write (operation 2 of @read_elsewhere): what is rotated is read before it is written
// CHECK-NEXT: applied at nn.kv_write (operation 2 of @int8): rope + kv_write -> rope_kv_write
// CHECK: nn.func @normed
// CHECK-NEXT: %q_1 = nn.rope_kv_write %q, %k, %v, %angles, %rows {eps = 1.0e-06, head_dim = 4, k_norm = @k_norm, q_norm = @q_norm} : tensor<?x8xf32>
// CHECK-NEXT: nn.return %q_1
// CHECK: nn.func @other_eps
// CHECK: nn.rms_norm
// CHECK: nn.rms_norm
// CHECK-NEXT: nn.rope_kv_write {{.*}} {head_dim = 4}
// CHECK: nn.func @read_elsewhere
// CHECK-NEXT: nn.rope %
// CHECK-NEXT: nn.kv_write
// CHECK: nn.func @int8
// CHECK-NEXT: nn.rope_kv_write {{.*}} {head_dim = 4, kv_dtype = int8}

builtin.module {
  nn.func @normed(%q: tensor<?x8xf32>, %k: tensor<?x4xf32>, %v: tensor<?x4xf32>, %angles: tensor<?x4xf32>, %rows: !batch.rows<decode>) -> tensor<?x8xf32> {
    %a = nn.rms_norm %q, @q_norm {eps = 1.0e-06, heads = 2} : tensor<?x8xf32>
    %b = nn.rms_norm %k, @k_norm {eps = 1.0e-06, heads = 1} : tensor<?x4xf32>
    %q_1, %k_1 = nn.rope %a, %b, %angles {head_dim = 4} : tensor<?x8xf32>, tensor<?x4xf32>
    nn.kv_write %k_1, %v, %rows {head_dim = 4}
    nn.return %q_1
  }
  nn.func @other_eps(%q: tensor<?x8xf32>, %k: tensor<?x4xf32>, %v: tensor<?x4xf32>, %angles: tensor<?x4xf32>, %rows: !batch.rows<decode>) -> tensor<?x8xf32> {
    %a = nn.rms_norm %q, @q_norm {eps = 1.0e-06, heads = 2} : tensor<?x8xf32>
    %b = nn.rms_norm %k, @k_norm {eps = 1.0e-05, heads = 1} : tensor<?x4xf32>
    %q_1, %k_1 = nn.rope %a, %b, %angles {head_dim = 4} : tensor<?x8xf32>, tensor<?x4xf32>
    nn.kv_write %k_1, %v, %rows {head_dim = 4}
    nn.return %q_1
  }
  nn.func @read_elsewhere(%q: tensor<?x8xf32>, %k: tensor<?x4xf32>, %v: tensor<?x4xf32>, %angles: tensor<?x4xf32>, %rows: !batch.rows<decode>) -> (tensor<?x8xf32>, tensor<?x4xf32>) {
    %q_1, %k_1 = nn.rope %q, %k, %angles {head_dim = 4} : tensor<?x8xf32>, tensor<?x4xf32>
    nn.kv_write %k_1, %v, %rows {head_dim = 4}
    nn.return %q_1, %k_1
  }
  nn.func @int8(%q: tensor<?x8xf32>, %k: tensor<?x4xf32>, %v: tensor<?x4xf32>, %angles: tensor<?x4xf32>, %rows: !batch.rows<decode>) -> tensor<?x8xf32> {
    %q_1, %k_1 = nn.rope %q, %k, %angles {head_dim = 4} : tensor<?x8xf32>, tensor<?x4xf32>
    nn.kv_write %k_1, %v, %rows {head_dim = 4, kv_dtype = int8}
    nn.return %q_1
  }
}

// -----
// A norm that is only read quantised goes with its quantisation; one that is read as it is too, and norms of heads, stay.

// CHECK: applied at {{.*}} of @quantized): add + rms_norm -> add_rms_norm
// CHECK-NEXT: applied at {{.*}} of @quantized): add_rms_norm + quantize -> add_rms_norm_quantize
// CHECK-NEXT: applied at {{.*}} of @alone): rms_norm + quantize -> rms_norm_quantize
// CHECK-NEXT: declined at %values, %scales = nn.quantize (operation 2 of @read_too): the norm is also read as it is
// CHECK: nn.func @quantized
// CHECK-NEXT: %x_1, %values, %scales = nn.add_rms_norm_quantize %x, %y, @norm {eps = 1.0e-06} : tensor<?x8xf32>, tensor<?x8xi8>, tensor<?xf32>
// CHECK-NEXT: nn.return %x_1, %values, %scales
// CHECK: nn.func @alone
// CHECK-NEXT: %values, %scales = nn.rms_norm_quantize %x, @norm {eps = 1.0e-06} : tensor<?x8xi8>, tensor<?xf32>
// CHECK-NEXT: nn.return
// CHECK: nn.func @read_too
// CHECK-NEXT: nn.rms_norm
// CHECK-NEXT: nn.quantize
// CHECK: nn.func @heads
// CHECK-NEXT: nn.rms_norm
// CHECK-NEXT: nn.quantize

// Of the two, Ascend has the one with a sum.
// ASCEND: declined at {{.*}} of @alone): ascend has no nn.rms_norm_quantize
// ASCEND: nn.func @quantized
// ASCEND-NEXT: nn.add_rms_norm_quantize
// ASCEND: nn.func @alone
// ASCEND-NEXT: nn.rms_norm
// ASCEND-NEXT: nn.quantize

builtin.module {
  nn.func @quantized(%x: tensor<?x8xf32>, %y: tensor<?x8xf32>) -> (tensor<?x8xf32>, tensor<?x8xi8>, tensor<?xf32>) {
    %x_1 = nn.add %x, %y : tensor<?x8xf32>
    %h = nn.rms_norm %x_1, @norm {eps = 1.0e-06} : tensor<?x8xf32>
    %values, %scales = nn.quantize %h : tensor<?x8xi8>, tensor<?xf32>
    nn.return %x_1, %values, %scales
  }
  nn.func @alone(%x: tensor<?x8xf32>) -> (tensor<?x8xi8>, tensor<?xf32>) {
    %h = nn.rms_norm %x, @norm {eps = 1.0e-06} : tensor<?x8xf32>
    %values, %scales = nn.quantize %h : tensor<?x8xi8>, tensor<?xf32>
    nn.return %values, %scales
  }
  nn.func @read_too(%x: tensor<?x8xf32>) -> (tensor<?x8xf32>, tensor<?x8xi8>, tensor<?xf32>) {
    %h = nn.rms_norm %x, @norm {eps = 1.0e-06} : tensor<?x8xf32>
    %values, %scales = nn.quantize %h : tensor<?x8xi8>, tensor<?xf32>
    nn.return %h, %values, %scales
  }
  nn.func @heads(%x: tensor<?x8xf32>) -> (tensor<?x8xi8>, tensor<?xf32>) {
    %h = nn.rms_norm %x, @norm {eps = 1.0e-06, heads = 2} : tensor<?x8xf32>
    %values, %scales = nn.quantize %h : tensor<?x8xi8>, tensor<?xf32>
    nn.return %values, %scales
  }
}

// -----
// A product and its sum over the ranks, where the backend has a kernel for both together: not with a bias, nor where the
// product is read before, nor where only another kernel can read the matrix. A sum of something else stays.

// CHECK: declined at %sum = comm.all_reduce (operation 2 of @summed): @o_proj: cpu has no comm.linear_all_reduce
// CHECK: nn.func @summed
// CHECK-NEXT: nn.linear
// CHECK-NEXT: comm.all_reduce

// ASCEND: // kernel-fusion: applied at {{.*}} of @summed): @o_proj: linear + all_reduce -> linear_all_reduce
// ASCEND-NEXT: // kernel-fusion: applied at {{.*}} of @summed): add + rms_norm -> add_rms_norm
// ASCEND-NEXT: // kernel-fusion: declined at %sum = comm.all_reduce (operation 2 of @biased): @o_proj: its product has a bias
// ASCEND-NEXT: // kernel-fusion: declined at %sum = comm.all_reduce (operation 2 of @read_before): @o_proj: its product is read before it is summed
// ASCEND-NEXT: // kernel-fusion: declined at %sum = comm.all_reduce (operation 2 of @packed): @o_proj is packed as blocked
// ASCEND-NEXT: builtin.module
// ASCEND-NEXT: nn.func @summed
// ASCEND-NEXT: %sum = comm.linear_all_reduce %x, @o_proj {group = tp} : tensor<?x8xbf16>
// ASCEND-NEXT: %x_1, %h = nn.add_rms_norm %y, %sum, @norm
// ASCEND: nn.func @biased
// ASCEND: comm.all_reduce
// ASCEND: nn.func @read_before
// ASCEND: comm.all_reduce
// ASCEND: nn.func @packed
// ASCEND: comm.all_reduce
// ASCEND: nn.func @no_product
// ASCEND: comm.all_reduce

builtin.module {
  nn.func @summed(%x: tensor<?x4xbf16>, %y: tensor<?x8xbf16>) -> (tensor<?x8xbf16>, tensor<?x8xbf16>) {
    %o = nn.linear %x, @o_proj : tensor<?x8xbf16>
    %sum = comm.all_reduce %o {group = tp} : tensor<?x8xbf16>
    %x_1 = nn.add %y, %sum : tensor<?x8xbf16>
    %h = nn.rms_norm %x_1, @norm {eps = 1.0e-06} : tensor<?x8xbf16>
    nn.return %x_1, %h
  }
  nn.func @biased(%x: tensor<?x4xbf16>) -> tensor<?x8xbf16> {
    %o = nn.linear %x, @o_proj {bias = @o_bias} : tensor<?x8xbf16>
    %sum = comm.all_reduce %o {group = tp} : tensor<?x8xbf16>
    nn.return %sum
  }
  nn.func @read_before(%x: tensor<?x4xbf16>) -> (tensor<?x8xbf16>, tensor<?x8xbf16>) {
    %o = nn.linear %x, @o_proj : tensor<?x8xbf16>
    %sum = comm.all_reduce %o {group = tp} : tensor<?x8xbf16>
    nn.return %o, %sum
  }
  nn.func @packed(%x: tensor<?x4xbf16>) -> tensor<?x8xbf16> {
    %o = nn.linear %x, @o_proj {layout = blocked} : tensor<?x8xbf16>
    %sum = comm.all_reduce %o {group = tp} : tensor<?x8xbf16>
    nn.return %sum
  }
  nn.func @no_product(%x: tensor<?x8xbf16>) -> tensor<?x8xbf16> {
    %sum = comm.all_reduce %x {group = tp} : tensor<?x8xbf16>
    nn.return %sum
  }
}

// -----
// Two filters of the logits, one behind the other.

// CHECK: declined at %logits = nn.top_p (operation 2 of @sample): cpu has no nn.top_k_top_p
// ASCEND: applied at {{.*}} of @sample): top_k + top_p -> top_k_top_p
// ASCEND: nn.func @sample
// ASCEND-NEXT: %logits_1 = nn.top_k_top_p %logits, %how : tensor<?x32xf32>
// ASCEND-NEXT: nn.min_p %logits_1, %how

builtin.module {
  nn.func @sample(%logits: tensor<?x32xf32>, %how: !batch.sampling<draw, top_k, top_p, min_p>) -> tensor<?xi64> {
    %logits_1 = nn.top_k %logits, %how : tensor<?x32xf32>
    %logits_2 = nn.top_p %logits_1, %how : tensor<?x32xf32>
    %logits_3 = nn.min_p %logits_2, %how : tensor<?x32xf32>
    %tokens = nn.draw %logits_3, %how : tensor<?xi64>
    nn.return %tokens
  }
}
