// RUN: sagellm opt %s | sagellm opt | filecheck %s
// RUN: sagellm opt %s --generic | filecheck %s --check-prefix GENERIC
// RUN: sagellm opt %s --generic | sagellm opt | filecheck %s

// A step of decodes and prefills, some of which begin alike.

builtin.module {
  // CHECK: batch.step @step {
  // GENERIC: "batch.step"() <{sym_name = "step"}> ({
  batch.step @step {
    // CHECK: %decode = batch.group {bucket = 4, phase = decode, table = #batch.table<3 rows>} : !batch.group<decode>
    // GENERIC: %decode = "batch.group"() <{bucket = 4 : i64, phase = "decode", table = #batch.table<3 rows>}> : () -> !batch.group<decode>
    %decode = batch.group {bucket = 4, phase = decode, table = #batch.table<3 rows>} : !batch.group<decode>
    // CHECK: %prefill = batch.group {bucket = 16, facts = [shared, "cached-before"], phase = prefill, table = #batch.table<2 rows>} : !batch.group<prefill>
    // GENERIC: %prefill = "batch.group"() <{bucket = 16 : i64, facts = ["shared", "cached-before"], phase = "prefill", table = #batch.table<2 rows>}> : () -> !batch.group<prefill>
    %prefill = batch.group {bucket = 16, facts = [shared, "cached-before"], phase = prefill, table = #batch.table<2 rows>} : !batch.group<prefill>
    // CHECK: %shared = batch.share %prefill : !batch.group<prefill, shared>
    // GENERIC: %shared = "batch.share"(%prefill) : (!batch.group<prefill>) -> !batch.group<prefill, shared>
    %shared = batch.share %prefill : !batch.group<prefill, shared>
    // CHECK: %cascade = batch.cascade %decode : !batch.group<decode, cascade>
    // GENERIC: %cascade = "batch.cascade"(%decode) : (!batch.group<decode>) -> !batch.group<decode, cascade>
    %cascade = batch.cascade %decode : !batch.group<decode, cascade>
    %blocks = kv.allocate %decode, %shared : !kv.blocks
    // CHECK: %rows = batch.rows %decode, %shared, %blocks : !batch.rows<decode, prefill, shared>
    // GENERIC: %rows = "batch.rows"(%decode, %shared, %blocks) : (!batch.group<decode>, !batch.group<prefill, shared>, !kv.blocks) -> !batch.rows<decode, prefill, shared>
    %rows = batch.rows %decode, %shared, %blocks : !batch.rows<decode, prefill, shared>
    // CHECK: %how = batch.sampling %decode, %shared : !batch.sampling<draw>
    // GENERIC: %how = "batch.sampling"(%decode, %shared) : (!batch.group<decode>, !batch.group<prefill, shared>) -> !batch.sampling<draw>
    %how = batch.sampling %decode, %shared : !batch.sampling<draw>
    // CHECK: %logits = batch.forward %rows, @model : tensor<?x32xf32>
    // GENERIC: %logits = "batch.forward"(%rows) <{model = @model}> : (!batch.rows<decode, prefill, shared>) -> tensor<?x32xf32>
    %logits = batch.forward %rows, @model : tensor<?x32xf32>
    // CHECK: %tokens = batch.sample %logits, %how, @sample : tensor<?xi64>
    // GENERIC: %tokens = "batch.sample"(%logits, %how) <{sampler = @sample}> : (tensor<?x32xf32>, !batch.sampling<draw>) -> tensor<?xi64>
    %tokens = batch.sample %logits, %how, @sample : tensor<?xi64>
    // CHECK: batch.commit %tokens, %decode, %shared
    // GENERIC: "batch.commit"(%tokens, %decode, %shared) : (tensor<?xi64>, !batch.group<decode>, !batch.group<prefill, shared>) -> ()
    batch.commit %tokens, %decode, %shared
  }

  // A step of prompts whose vectors are wanted.
  // CHECK: batch.step @vectors {
  batch.step @vectors {
    %prefill = batch.group {bucket = 16, phase = prefill, table = #batch.table<2 rows>} : !batch.group<prefill>
    %blocks = kv.allocate %prefill : !kv.blocks
    %rows = batch.rows %prefill, %blocks : !batch.rows<prefill>
    %vectors = batch.forward %rows, @model : tensor<?x32xf32>
    // CHECK: batch.report %vectors, %prefill
    // GENERIC: "batch.report"(%vectors, %prefill) : (tensor<?x32xf32>, !batch.group<prefill>) -> ()
    batch.report %vectors, %prefill
  }
}
