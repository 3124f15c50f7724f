// RUN: sagellm opt %s | sagellm opt | filecheck %s
// RUN: sagellm opt %s --generic | filecheck %s --check-prefix GENERIC
// RUN: sagellm opt %s --generic | sagellm opt | filecheck %s

// Blocks for the groups of a step: one value, read by the rows.

builtin.module {
  batch.step @step {
    %decode = batch.group {bucket = 4, phase = decode, table = #batch.table<3 rows>} : !batch.group<decode>
    %prefill = batch.group {bucket = 16, phase = prefill, table = #batch.table<2 rows>} : !batch.group<prefill>
    // Blocks that move before the step computes; which ones is in the table.
    // CHECK: kv.evict {table = #batch.table<2 rows>}
    // CHECK-NEXT: kv.offload {table = #batch.table<1 rows>}
    // CHECK-NEXT: kv.fetch {table = #batch.table<1 rows>}
    // CHECK-NEXT: kv.copy {table = #batch.table<1 rows>}
    // CHECK-NEXT: kv.offload {table = #batch.table<2 rows>, when = ahead}
    // CHECK-NEXT: kv.fetch {table = #batch.table<2 rows>, when = ahead}
    kv.evict {table = #batch.table<2 rows>}
    kv.offload {table = #batch.table<1 rows>}
    kv.fetch {table = #batch.table<1 rows>}
    kv.copy {table = #batch.table<1 rows>}
    kv.offload {table = #batch.table<2 rows>, when = ahead}
    kv.fetch {table = #batch.table<2 rows>, when = ahead}
    // CHECK: %blocks = kv.allocate %decode, %prefill : !kv.blocks
    // GENERIC: %blocks = "kv.allocate"(%decode, %prefill) : (!batch.group<decode>, !batch.group<prefill>) -> !kv.blocks
    %blocks = kv.allocate %decode, %prefill : !kv.blocks
    %rows = batch.rows %decode, %prefill, %blocks : !batch.rows<decode, prefill>
    %how = batch.sampling %decode, %prefill : !batch.sampling
    %logits = batch.forward %rows, @model : tensor<?x32xf32>
    %tokens = batch.sample %logits, %how, @sample : tensor<?xi64>
    batch.commit %tokens, %decode, %prefill
  }
}
