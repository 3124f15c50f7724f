// RUN: sagellm opt %s | sagellm opt | filecheck %s
// RUN: sagellm opt %s --generic | filecheck %s --check-prefix GENERIC
// RUN: sagellm opt %s --generic | sagellm opt | filecheck %s

// A step that verifies guessed tokens.

builtin.module {
  batch.step @step {
    %decode = batch.group {bucket = 4, facts = [drafted], phase = decode, table = #batch.table<3 rows>} : !batch.group<decode>
    // CHECK: %tree = spec.branch %decode : !batch.group<decode, tree>
    // GENERIC: %tree = "spec.branch"(%decode) : (!batch.group<decode>) -> !batch.group<decode, tree>
    %tree = spec.branch %decode : !batch.group<decode, tree>
    %blocks = kv.allocate %tree : !kv.blocks
    %rows = batch.rows %tree, %blocks : !batch.rows<decode, tree>
    %how = batch.sampling %tree : !batch.sampling<draw>
    %logits = batch.forward %rows, @model : tensor<?x32xf32>
    %tokens = batch.sample %logits, %how, @sample : tensor<?xi64>
    // CHECK: %path = spec.verify %tokens, %tree : tensor<?xi64>
    // GENERIC: %path = "spec.verify"(%tokens, %tree) : (tensor<?xi64>, !batch.group<decode, tree>) -> tensor<?xi64>
    %path = spec.verify %tokens, %tree : tensor<?xi64>
    // CHECK: spec.commit %path, %tree
    // GENERIC: "spec.commit"(%path, %tree) : (tensor<?xi64>, !batch.group<decode, tree>) -> ()
    spec.commit %path, %tree
    batch.commit %path, %tree
  }
}
