// RUN: sagellm opt %s --split-input-file -p cleanup --remarks | filecheck %s

// Two equal norms become one; what only the second fed, and what nobody reads, goes.

// CHECK: // cleanup: applied at %b = nn.rms_norm (operation 2 of @f): the same as an earlier operation
// CHECK-NEXT: // cleanup: applied at %unread = nn.silu (operation 5 of @f): nobody reads its result
// CHECK-NEXT: // cleanup: applied at %unused = nn.silu (operation 4 of @f): nobody reads its result
// CHECK: nn.func @f
// CHECK-NEXT: %a = nn.rms_norm %x, @norm {eps = 1.0e-06} : tensor<?x8xf32>
// CHECK-NEXT: %c = nn.rms_norm %x, @norm {eps = 1.0e-05} : tensor<?x8xf32>
// CHECK-NEXT: %s = nn.add %a, %a : tensor<?x8xf32>
// CHECK-NEXT: nn.return %s, %c

builtin.module {
  nn.func @f(%x: tensor<?x8xf32>) -> (tensor<?x8xf32>, tensor<?x8xf32>) {
    %a = nn.rms_norm %x, @norm {eps = 1.0e-06} : tensor<?x8xf32>
    %b = nn.rms_norm %x, @norm {eps = 1.0e-06} : tensor<?x8xf32>
    %c = nn.rms_norm %x, @norm {eps = 1.0e-05} : tensor<?x8xf32>
    %s = nn.add %a, %b : tensor<?x8xf32>
    %unused = nn.silu %s : tensor<?x8xf32>
    %unread = nn.silu %unused : tensor<?x8xf32>
    nn.return %s, %c
  }
}

// -----
// Operations with effects stay, and stay twice: between two reads of the cache there may be a write.

// CHECK-NOT: // cleanup
// CHECK: nn.kv_write
// CHECK-NEXT: %a = nn.attention
// CHECK-NEXT: nn.kv_write
// CHECK-NEXT: %b = nn.attention
// CHECK-NEXT: %unread = nn.attention
// CHECK-NEXT: nn.return %a, %b

builtin.module {
  nn.func @effects(%q: tensor<?x8xf32>, %k: tensor<?x4xf32>, %rows: !batch.rows<decode>) -> (tensor<?x8xf32>, tensor<?x8xf32>) {
    nn.kv_write %k, %k, %rows {head_dim = 4}
    %a = nn.attention %q, %rows {head_dim = 4, kv_heads = 1, scale = 0.5} : tensor<?x8xf32>
    nn.kv_write %k, %k, %rows {head_dim = 4}
    %b = nn.attention %q, %rows {head_dim = 4, kv_heads = 1, scale = 0.5} : tensor<?x8xf32>
    %unread = nn.attention %q, %rows {head_dim = 4, kv_heads = 1, scale = 0.5} : tensor<?x8xf32>
    nn.return %a, %b
  }
}

// -----
// The weights program is cleaned too: a tensor that is loaded twice is loaded once, one that nobody stores not at all.

// CHECK: // cleanup: applied at %b = weights.tensor (operation 3 of @load.f): the same as an earlier operation
// CHECK-NEXT: // cleanup: applied at %c = weights.tensor (operation 4 of @load.f): nobody reads its result
// CHECK: %a = weights.tensor {source = "a.weight"} : tensor<8x8xf32>
// CHECK-NEXT: weights.store %a, @a
// CHECK-NEXT: weights.store %a, @b
// CHECK-NEXT: }

builtin.module {
  weights.load @load.f layers 0 to 1 {
    %a = weights.tensor {source = "a.weight"} : tensor<8x8xf32>
    weights.store %a, @a
    %b = weights.tensor {source = "a.weight"} : tensor<8x8xf32>
    weights.store %b, @b
    %c = weights.tensor {source = "c.weight"} : tensor<8x8xf32>
  }
}

// -----
// The step's operations: all that has an effect or is read stays.

// CHECK-NOT: // cleanup
// CHECK: batch.group
// CHECK: kv.allocate
// CHECK: batch.commit

builtin.module {
  batch.step @step {
    %decode = batch.group {bucket = 1, phase = decode, table = #batch.table<1 rows>} : !batch.group<decode>
    %blocks = kv.allocate %decode : !kv.blocks
    %rows = batch.rows %decode, %blocks : !batch.rows<decode>
    %how = batch.sampling %decode : !batch.sampling
    %logits = batch.forward %rows, @model : tensor<?x32xf32>
    %tokens = batch.sample %logits, %how, @sample : tensor<?xi64>
    batch.commit %tokens, %decode
  }
}
