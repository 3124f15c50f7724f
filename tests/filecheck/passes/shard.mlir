// RUN: sagellm opt %s --split-input-file -p shard{ranks=2} --remarks --verify-diagnostics | filecheck %s
// RUN: sagellm opt %s --split-input-file -p shard --remarks | filecheck %s --check-prefix ONE
// RUN: sagellm opt %s --split-input-file -p shard{ranks=2},kernel-fusion,pack-weights --layout float32=blocked \
// RUN:     --verify-diagnostics | filecheck %s --check-prefix FUSED
// RUN: sagellm opt %s --split-input-file -p kernel-fusion,shard{ranks=2} --verify-diagnostics \
// RUN:     | filecheck %s --check-prefix LATE

// A layer of 2 query heads and 1 KV head among two ranks: each has one query head; both have the KV head. The sum of
// o's products goes around, and its bias is added to it once.

// CHECK: // shard: applied at %q = nn.linear (operation 1 of @layer): @q_proj: its outputs are divided among 2 ranks
// CHECK-NEXT: // shard: applied at %k = nn.linear (operation 2 of @layer): @k_proj: its outputs are divided among 2 ranks, each part on 2
// CHECK-NEXT: // shard: applied at %v = nn.linear (operation 3 of @layer): @v_proj: its outputs are divided among 2 ranks, each part on 2
// CHECK-NEXT: // shard: applied at %o = nn.linear (operation 8 of @layer): @o_proj: its inputs are divided among 2 ranks, products are summed
// CHECK-NEXT: // shard: applied at the model: each of 2 ranks holds 560 of 816 bytes of weights (68.63%)
// CHECK: %q = nn.linear %h, @q_proj : tensor<?x4xf32>
// CHECK-NEXT: %k = nn.linear %h, @k_proj : tensor<?x4xf32>
// CHECK-NEXT: %v = nn.linear %h, @v_proj : tensor<?x4xf32>
// CHECK-NEXT: %q_1 = nn.rms_norm %q, @q_norm {eps = 1.0e-06, heads = 1} : tensor<?x4xf32>
// CHECK-NEXT: %q_2, %k_1 = nn.rope %q_1, %k, %angles {head_dim = 4} : tensor<?x4xf32>, tensor<?x4xf32>
// CHECK-NEXT: nn.kv_write %k_1, %v, %rows {head_dim = 4}
// CHECK-NEXT: %attn = nn.attention %q_2, %rows {head_dim = 4, kv_heads = 1, scale = 0.5} : tensor<?x4xf32>
// CHECK-NEXT: %o = nn.linear %attn, @o_proj {bias = @o_bias} : tensor<?x8xf32>
// CHECK-NEXT: %sum = comm.all_reduce %o {group = tp} : tensor<?x8xf32>
// CHECK-NEXT: nn.return %sum
// CHECK: %q_proj = weights.tensor {dim = 0, parts = 2, source = "{layer}.q"} : tensor<4x8xf32>
// CHECK: %k_proj = weights.tensor {source = "{layer}.k"} : tensor<4x8xf32>
// CHECK: %o_proj = weights.tensor {dim = 1, parts = 2, source = "{layer}.o"} : tensor<8x4xf32>
// CHECK: %o_bias = weights.tensor {once, source = "{layer}.o_bias"} : tensor<8xf32>
// CHECK: %q_norm = weights.tensor {source = "{layer}.q_norm"} : tensor<4xf32>

// One rank holds everything, and there is nothing to say.
// ONE-NOT: // shard
// ONE-NOT: comm.

// Later passes join and pack each rank's parts.
// FUSED: %qkv = nn.linear %h, @qkv_proj {layout = blocked} : tensor<?x12xf32>
// FUSED: %qkv_proj = weights.concat %q_proj, %k_proj, %v_proj : tensor<12x8xf32>
// FUSED-NEXT: %qkv_proj_1 = weights.pack %qkv_proj {layout = blocked} : tensor<12x8xf32>

// LATE: shard: @qkv_proj of %qkv = nn.linear (operation 1 of @layer) is joined or packed already; accepted: shard before kernel-fusion and pack-weights

builtin.module {
  nn.func @layer(%h: tensor<?x8xf32>, %angles: tensor<?x4xf32>, %rows: !batch.rows<decode>) -> tensor<?x8xf32> {
    %q = nn.linear %h, @q_proj : tensor<?x8xf32>
    %k = nn.linear %h, @k_proj : tensor<?x4xf32>
    %v = nn.linear %h, @v_proj : tensor<?x4xf32>
    %q_1 = nn.rms_norm %q, @q_norm {eps = 1.0e-06, heads = 2} : tensor<?x8xf32>
    %q_2, %k_1 = nn.rope %q_1, %k, %angles {head_dim = 4} : tensor<?x8xf32>, tensor<?x4xf32>
    nn.kv_write %k_1, %v, %rows {head_dim = 4}
    %attn = nn.attention %q_2, %rows {head_dim = 4, kv_heads = 1, scale = 0.5} : tensor<?x8xf32>
    %o = nn.linear %attn, @o_proj {bias = @o_bias} : tensor<?x8xf32>
    nn.return %o
  }
  weights.load @load.layer layers 0 to 1 {
    %q_proj = weights.tensor {source = "{layer}.q"} : tensor<8x8xf32>
    weights.store %q_proj, @q_proj
    %k_proj = weights.tensor {source = "{layer}.k"} : tensor<4x8xf32>
    weights.store %k_proj, @k_proj
    %v_proj = weights.tensor {source = "{layer}.v"} : tensor<4x8xf32>
    weights.store %v_proj, @v_proj
    %o_proj = weights.tensor {source = "{layer}.o"} : tensor<8x8xf32>
    weights.store %o_proj, @o_proj
    %o_bias = weights.tensor {source = "{layer}.o_bias"} : tensor<8xf32>
    weights.store %o_bias, @o_bias
    %q_norm = weights.tensor {source = "{layer}.q_norm"} : tensor<4xf32>
    weights.store %q_norm, @q_norm
  }
}

// -----
// The embedding by the vocabulary; the logits are put together from all ranks, before they are widened.

// CHECK: %x = nn.embedding %rows, @embed_tokens {group = tp} : tensor<?x8xf32>
// CHECK-NEXT: %sum = comm.all_reduce %x {group = tp} : tensor<?x8xf32>
// CHECK-NEXT: %last = nn.select_outputs %sum, %rows : tensor<?x8xf32>
// CHECK-NEXT: %lm_head = nn.linear %last, @lm_head : tensor<?x16xf32>
// CHECK-NEXT: %all = comm.all_gather %lm_head {dim = 1, group = tp} : tensor<?x32xf32>
// CHECK-NEXT: nn.return %all
// CHECK: %embed_tokens = weights.tensor {dim = 0, parts = 2, source = "embed.weight"} : tensor<16x8xf32>
// CHECK: %lm_head = weights.tensor {dim = 0, parts = 2, source = "head.weight"} : tensor<16x8xf32>

builtin.module {
  nn.func @ends(%rows: !batch.rows<decode>) -> tensor<?x32xf32> {
    %x = nn.embedding %rows, @embed_tokens : tensor<?x8xf32>
    %last = nn.select_outputs %x, %rows : tensor<?x8xf32>
    %lm_head = nn.linear %last, @lm_head : tensor<?x32xf32>
    nn.return %lm_head
  }
  weights.load @load.ends layers 0 to 1 {
    %embed_tokens = weights.tensor {source = "embed.weight"} : tensor<32x8xf32>
    weights.store %embed_tokens, @embed_tokens
    %lm_head = weights.tensor {source = "head.weight"} : tensor<32x8xf32>
    weights.store %lm_head, @lm_head
  }
}

// -----
// A product that is added whole stays whole on every rank.

// CHECK: // shard: declined at %a = nn.linear (operation 1 of @whole): @a_proj: nn.add reads all of its product
// CHECK: nn.linear %x, @a_proj : tensor<?x8xf32>
// CHECK-NOT: comm.

builtin.module {
  nn.func @whole(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    %a = nn.linear %x, @a_proj : tensor<?x8xf32>
    %sum = nn.add %x, %a : tensor<?x8xf32>
    nn.return %sum
  }
  weights.load @load.whole layers 0 to 1 {
    %a_proj = weights.tensor {source = "a.weight"} : tensor<8x8xf32>
    weights.store %a_proj, @a_proj
  }
}

// -----
// Without a weights program nothing can be divided.

// CHECK: // shard: declined at nn.func @bare: it has no weights program

builtin.module {
  nn.func @bare(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    %a = nn.linear %x, @a_proj : tensor<?x8xf32>
    nn.return %a
  }
}

// -----
// Sizes that cannot be divided are one line of error.

// CHECK: shard: %gate = nn.linear (operation 1 of @odd) has 7 columns for 2 ranks; accepted: a number of ranks that divides 7

builtin.module {
  nn.func @odd(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    %gate = nn.linear %x, @gate_proj : tensor<?x7xf32>
    %act = nn.silu %gate : tensor<?x7xf32>
    %down = nn.linear %act, @down_proj : tensor<?x8xf32>
    nn.return %down
  }
  weights.load @load.odd layers 0 to 1 {
    %gate_proj = weights.tensor {source = "gate"} : tensor<7x8xf32>
    weights.store %gate_proj, @gate_proj
    %down_proj = weights.tensor {source = "down"} : tensor<8x7xf32>
    weights.store %down_proj, @down_proj
  }
}
