// RUN: sagellm opt %s --split-input-file -p prefix-dedup --remarks | filecheck %s
// RUN: sagellm opt %s --split-input-file -p prefix-dedup --tables | filecheck %s --check-prefix TABLES

// The fact `shared` says that `decide` found common beginnings. Every use of the group waits for the share.

// CHECK: // prefix-dedup: declined at %decode = batch.group (operation 1 of @step): no decode rows of this step gain by reading a common beginning together
// CHECK-NEXT: // prefix-dedup: applied at %prefill = batch.group (operation 2 of @step): common beginnings are computed once
// CHECK-NEXT: builtin.module
// CHECK: %decode = batch.group {{.*}} : !batch.group<decode>
// CHECK-NEXT: %prefill = batch.group {bucket = 8, facts = [shared], phase = prefill, table = #batch.table<2 rows>} : !batch.group<prefill>
// CHECK-NEXT: %shared = batch.share %prefill : !batch.group<prefill, shared>
// CHECK-NEXT: %blocks = kv.allocate %decode, %shared : !kv.blocks
// CHECK-NEXT: %rows = batch.rows %decode, %shared, %blocks : !batch.rows<decode, prefill, shared>
// CHECK-NEXT: %how = batch.sampling %decode, %shared : !batch.sampling
// CHECK-NEXT: %logits = batch.forward %rows, @model : tensor<?x32xf32>
// CHECK: batch.commit %tokens, %decode, %shared

// TABLES: table = #batch.table<1 rows>
// TABLES: table = #batch.table<2 rows,
// TABLES-NEXT: {row = 0, context = 0, new = 4, leader = -1, shared = 0},
// TABLES-NEXT: {row = 1, context = 0, new = 4, leader = 0, shared = 3}>

builtin.module {
  batch.step @step {
    %decode = batch.group {bucket = 1, phase = decode, table = #batch.table<1 rows>} : !batch.group<decode>
    %prefill = batch.group {bucket = 8, facts = [shared], phase = prefill, table = #batch.table<2 rows,
      {row = 0, context = 0, new = 4, leader = -1, shared = 0},
      {row = 1, context = 0, new = 4, leader = 0, shared = 3}>} : !batch.group<prefill>
    %blocks = kv.allocate %decode, %prefill : !kv.blocks
    %rows = batch.rows %decode, %prefill, %blocks : !batch.rows<decode, prefill>
    %how = batch.sampling %decode, %prefill : !batch.sampling
    %logits = batch.forward %rows, @model : tensor<?x32xf32>
    %tokens = batch.sample %logits, %how, @sample : tensor<?xi64>
    batch.commit %tokens, %decode, %prefill
  }
}

// -----
// Without the facts nothing is shared and nothing read together.

// CHECK: // prefix-dedup: declined at %prefill = batch.group (operation 2 of @step): no two prompts of this step begin alike
// CHECK-NOT: // prefix-dedup
// CHECK: %blocks = kv.allocate %decode, %prefill : !kv.blocks
// CHECK: !batch.rows<decode, prefill>
// CHECK-NOT: batch.share

builtin.module {
  batch.step @step {
    %decode = batch.group {bucket = 1, phase = decode, table = #batch.table<1 rows>} : !batch.group<decode>
    %prefill = batch.group {bucket = 8, phase = prefill, table = #batch.table<2 rows>} : !batch.group<prefill>
    %blocks = kv.allocate %decode, %prefill : !kv.blocks
    %rows = batch.rows %decode, %prefill, %blocks : !batch.rows<decode, prefill>
    %how = batch.sampling %decode, %prefill : !batch.sampling
    %logits = batch.forward %rows, @model : tensor<?x32xf32>
    %tokens = batch.sample %logits, %how, @sample : tensor<?xi64>
    batch.commit %tokens, %decode, %prefill
  }
}

// -----
// The fact `cascade` says that `decide` found decode rows with equal first blocks.

// CHECK: // prefix-dedup: applied at %decode = batch.group (operation 1 of @step): common beginnings are read once
// CHECK-NEXT: // prefix-dedup: applied at %prefill
// CHECK: %decode = batch.group {bucket = 2, facts = [cascade], phase = decode, table = #batch.table<2 rows>} : !batch.group<decode>
// CHECK-NEXT: %cascade = batch.cascade %decode : !batch.group<decode, cascade>
// CHECK: %blocks = kv.allocate %cascade, %shared : !kv.blocks
// CHECK-NEXT: %rows = batch.rows %cascade, %shared, %blocks : !batch.rows<decode, prefill, cascade, shared>
// CHECK: batch.commit %tokens, %cascade, %shared

builtin.module {
  batch.step @step {
    %decode = batch.group {bucket = 2, facts = [cascade], phase = decode, table = #batch.table<2 rows>} : !batch.group<decode>
    %prefill = batch.group {bucket = 8, facts = [shared], phase = prefill, table = #batch.table<2 rows>} : !batch.group<prefill>
    %blocks = kv.allocate %decode, %prefill : !kv.blocks
    %rows = batch.rows %decode, %prefill, %blocks : !batch.rows<decode, prefill>
    %how = batch.sampling %decode, %prefill : !batch.sampling
    %logits = batch.forward %rows, @model : tensor<?x32xf32>
    %tokens = batch.sample %logits, %how, @sample : tensor<?xi64>
    batch.commit %tokens, %decode, %prefill
  }
}
