// RUN: sagellm opt %s --split-input-file -p kv-eviction-placement --remarks | filecheck %s
// RUN: not sagellm opt %s -p "kv-eviction-placement{policy=oldest}" 2>&1 | filecheck %s --check-prefix POLICY

// POLICY: unknown policy 'oldest'
// POLICY-SAME: lru

// Copies of blocks that this step hands out again stay in front of the allocation, and what is fetched for it in front
// of the forward. Copies made ahead, either way, run beside the forward.

// CHECK: // kv-eviction-placement: applied at kv.evict (operation 2 of @step): blocks were kept until room was needed
// CHECK-NEXT: // kv-eviction-placement: declined at kv.offload (operation 3 of @step): this step hands its blocks out again
// CHECK-NEXT: // kv-eviction-placement: declined at kv.fetch (operation 4 of @step): this step reads its blocks
// CHECK-NEXT: // kv-eviction-placement: applied at kv.offload {{.*}}: this step does not touch its blocks, so it runs beside the forward
// CHECK-NEXT: // kv-eviction-placement: applied at kv.fetch {{.*}}: this step does not touch its blocks, so it runs beside the forward
// CHECK: kv.evict {table = #batch.table<2 rows>}
// CHECK-NEXT: kv.offload {table = #batch.table<1 rows>}
// CHECK-NEXT: kv.fetch {table = #batch.table<1 rows>}
// CHECK-NEXT: %blocks = kv.allocate %decode : !kv.blocks
// CHECK-NEXT: %rows = batch.rows %decode, %blocks : !batch.rows<decode>
// CHECK-NEXT: %how = batch.sampling %decode : !batch.sampling
// CHECK-NEXT: %logits = batch.forward %rows, @model : tensor<?x32xf32>
// CHECK-NEXT: kv.fetch {table = #batch.table<3 rows>, when = ahead}
// CHECK-NEXT: kv.offload {table = #batch.table<2 rows>, when = ahead}
// CHECK-NEXT: %tokens = batch.sample

builtin.module {
  batch.step @step {
    %decode = batch.group {bucket = 4, phase = decode, table = #batch.table<3 rows>} : !batch.group<decode>
    kv.evict {table = #batch.table<2 rows>}
    kv.offload {table = #batch.table<1 rows>}
    kv.fetch {table = #batch.table<1 rows>}
    kv.offload {table = #batch.table<2 rows>, when = ahead}
    kv.fetch {table = #batch.table<3 rows>, when = ahead}
    %blocks = kv.allocate %decode : !kv.blocks
    %rows = batch.rows %decode, %blocks : !batch.rows<decode>
    %how = batch.sampling %decode : !batch.sampling
    %logits = batch.forward %rows, @model : tensor<?x32xf32>
    %tokens = batch.sample %logits, %how, @sample : tensor<?xi64>
    batch.commit %tokens, %decode
  }
}

// -----
// Nothing leaves, nothing to place.

// CHECK-NOT: kv-eviction-placement
// CHECK: %decode = batch.group
// CHECK-NEXT: %blocks = kv.allocate %decode : !kv.blocks

builtin.module {
  batch.step @step {
    %decode = batch.group {bucket = 4, phase = decode, table = #batch.table<3 rows>} : !batch.group<decode>
    %blocks = kv.allocate %decode : !kv.blocks
    %rows = batch.rows %decode, %blocks : !batch.rows<decode>
    %how = batch.sampling %decode : !batch.sampling
    %logits = batch.forward %rows, @model : tensor<?x32xf32>
    %tokens = batch.sample %logits, %how, @sample : tensor<?xi64>
    batch.commit %tokens, %decode
  }
}
