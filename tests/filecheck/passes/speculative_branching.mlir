// RUN: sagellm opt %s -p speculative-branching --split-input-file --remarks | filecheck %s
// Guesses about the decodes: each use of the group waits for the branch, and what is committed has been verified.

// CHECK: // speculative-branching: applied at %decode = batch.group (operation 1 of @step): guessed tokens are verified in one forward
// CHECK-NEXT: builtin.module
// CHECK: %decode = batch.group {bucket = 2, facts = [drafted], phase = decode, table = #batch.table<2 rows>} : !batch.group<decode>
// CHECK-NEXT: %tree = spec.branch %decode : !batch.group<decode, tree>
// CHECK-NEXT: %blocks = kv.allocate %tree : !kv.blocks
// CHECK-NEXT: %rows = batch.rows %tree, %blocks : !batch.rows<decode, tree>
// CHECK-NEXT: %how = batch.sampling %tree : !batch.sampling<penalties, draw>
// CHECK-NEXT: %logits = batch.forward %rows, @model : tensor<?x32xf32>
// CHECK-NEXT: %tokens = batch.sample %logits, %how, @sample : tensor<?xi64>
// CHECK-NEXT: %path = spec.verify %tokens, %tree : tensor<?xi64>
// CHECK-NEXT: spec.commit %path, %tree
// CHECK-NEXT: batch.commit %path, %tree

builtin.module {
  batch.step @step {
    %decode = batch.group {bucket = 2, facts = [drafted], phase = decode, table = #batch.table<2 rows>} : !batch.group<decode>
    %blocks = kv.allocate %decode : !kv.blocks
    %rows = batch.rows %decode, %blocks : !batch.rows<decode>
    %how = batch.sampling %decode : !batch.sampling<penalties, draw>
    %logits = batch.forward %rows, @model : tensor<?x32xf32>
    %tokens = batch.sample %logits, %how, @sample : tensor<?xi64>
    batch.commit %tokens, %decode
  }
}

// -----
// Without the fact nothing is guessed. Prompts never are.

// CHECK: // speculative-branching: declined at %decode = batch.group (operation 1 of @step): no guess is expected to pay in this step
// CHECK-NOT: // speculative-branching
// CHECK: !batch.rows<decode, prefill>
// CHECK-NOT: spec.

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
