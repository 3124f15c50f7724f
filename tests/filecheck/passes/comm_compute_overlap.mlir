// RUN: sagellm opt %s --split-input-file -p 'comm-compute-overlap{tokens=8192 ranks=2 topology=hccs}' --remarks \
// RUN:     | filecheck %s
// RUN: sagellm opt %s --split-input-file -p 'comm-compute-overlap{tokens=16 ranks=2 topology=hccs}' --remarks \
// RUN:     | filecheck %s --check-prefix TINY
// RUN: sagellm opt %s --split-input-file -p comm-compute-overlap --remarks | filecheck %s --check-prefix UNKNOWN
// RUN: sagellm opt %s --split-input-file -p 'comm-compute-overlap{tokens=8192 ranks=2 topology=hccs}' --remarks \
// RUN:     --without comm.start | filecheck %s --check-prefix NO-START

// Each half's sum is on its way while the other half is computed. Attention is not cut: it sees all rows.

// CHECK: // comm-compute-overlap: applied at %sum = comm.all_reduce (operation 3 of @layer): 8192 tokens, 1 x 2416.7 us on hccs: {{[0-9.]+}} us; in two halves {{[0-9.]+}} us (predicted: +{{[0-9.]+}} us)
// CHECK: nn.func @layer
// CHECK-NEXT: %attn = nn.attention %q, %rows
// CHECK-NEXT: %attn_a, %attn_b = nn.split_rows %attn : tensor<?x2048xbf16>, tensor<?x2048xbf16>
// CHECK-NEXT: %o_a = nn.linear %attn_a, @o_proj {layout = blocked} : tensor<?x4096xbf16>
// CHECK-NEXT: %pending = comm.start %o_a {collective = all_reduce, group = tp} : !comm.pending
// CHECK-NEXT: %o_b = nn.linear %attn_b, @o_proj {layout = blocked} : tensor<?x4096xbf16>
// CHECK-NEXT: %pending_1 = comm.start %o_b {collective = all_reduce, group = tp} : !comm.pending
// CHECK: %sum_a = comm.wait %pending : tensor<?x4096xbf16>
// CHECK-NEXT: %x_a_1, %h_a = nn.add_rms_norm %x_a, %sum_a, @mlp_norm
// CHECK-NEXT: %gate_up_a = nn.linear %h_a, @gate_up_proj
// CHECK-NEXT: %sum_b = comm.wait %pending_1 : tensor<?x4096xbf16>
// CHECK-NEXT: %x_b_1, %h_b = nn.add_rms_norm %x_b, %sum_b, @mlp_norm
// CHECK-NEXT: %gate_up_b = nn.linear %h_b, @gate_up_proj
// CHECK-NEXT: %gate_up = nn.join_rows %gate_up_a, %gate_up_b : tensor<?x14336xbf16>
// CHECK-NEXT: nn.return %gate_up

// TINY: // comm-compute-overlap: declined at %sum = comm.all_reduce (operation 3 of @layer): 16 tokens, 1 x 24.7 us on hccs: {{.*}} (predicted: -
// TINY: %sum = comm.all_reduce %o {group = tp} : tensor<?x4096xbf16>
// TINY-NEXT: %x_1, %h = nn.add_rms_norm %x, %sum, @mlp_norm
// TINY-NOT: nn.split_rows

// UNKNOWN: // comm-compute-overlap: declined at %sum = comm.all_reduce (operation 3 of @layer): how many ranks there are is not known
// NO-START: // comm-compute-overlap: declined at %sum = comm.all_reduce (operation 3 of @layer): cpu has no comm.start

builtin.module {
  nn.func @layer(%x: tensor<?x4096xbf16>, %q: tensor<?x2048xbf16>, %rows: !batch.rows<prefill>) -> tensor<?x14336xbf16> {
    %attn = nn.attention %q, %rows {head_dim = 128, kv_heads = 4, scale = 0.08} : tensor<?x2048xbf16>
    %o = nn.linear %attn, @o_proj {layout = blocked} : tensor<?x4096xbf16>
    %sum = comm.all_reduce %o {group = tp} : tensor<?x4096xbf16>
    %x_1, %h = nn.add_rms_norm %x, %sum, @mlp_norm {eps = 1.0e-06} : tensor<?x4096xbf16>, tensor<?x4096xbf16>
    %gate_up = nn.linear %h, @gate_up_proj : tensor<?x14336xbf16>
    nn.return %gate_up
  }
}

// -----
// What does not hang on the collective is computed meanwhile, without cutting anything: products of other values.

// CHECK: // comm-compute-overlap: applied at %all = comm.all_gather (operation 1 of @beside): 8192 tokens, 1 x {{[0-9.]+}} us on hccs: {{[0-9.]+}} us; begun early
// CHECK: %pending = comm.start %x {collective = all_gather, dim = 1, group = tp} : !comm.pending
// CHECK-NEXT: %other = nn.linear %y, @other_proj : tensor<?x4096xbf16>
// CHECK-NEXT: %all = comm.wait %pending : tensor<?x4096xbf16>
// CHECK-NEXT: nn.return %all, %other

builtin.module {
  nn.func @beside(%x: tensor<?x2048xbf16>, %y: tensor<?x4096xbf16>) -> (tensor<?x4096xbf16>, tensor<?x4096xbf16>) {
    %all = comm.all_gather %x {dim = 1, group = tp} : tensor<?x4096xbf16>
    %other = nn.linear %y, @other_proj : tensor<?x4096xbf16>
    nn.return %all, %other
  }
}

// -----
// How many rows select_outputs leaves is not in the graph.

// CHECK: // comm-compute-overlap: declined at %all = comm.all_gather (operation 3 of @head): how many rows have outputs is not known

builtin.module {
  nn.func @head(%h: tensor<?x8xbf16>, %rows: !batch.rows<prefill>) -> tensor<?x32xbf16> {
    %last = nn.select_outputs %h, %rows : tensor<?x8xbf16>
    %logits = nn.linear %last, @lm_head : tensor<?x16xbf16>
    %all = comm.all_gather %logits {dim = 1, group = tp} : tensor<?x32xbf16>
    nn.return %all
  }
}

// -----
// What kernel-fusion joined is taken apart where that is predicted to pay, and stays joined where not.

// CHECK: // comm-compute-overlap: applied at %sum = comm.linear_all_reduce (operation 1 of @joined): 8192 tokens, 1 x 2416.7 us on hccs: {{[0-9.]+}} us; in two halves {{[0-9.]+}} us
// CHECK: nn.func @joined
// CHECK: %o = nn.linear %attn_a, @o_proj : tensor<?x4096xbf16>
// CHECK-NEXT: %pending = comm.start %o {collective = all_reduce, group = tp} : !comm.pending
// CHECK-NOT: comm.linear_all_reduce
// CHECK: nn.return

// TINY: // comm-compute-overlap: declined at %sum = comm.linear_all_reduce (operation 1 of @joined): 16 tokens, 1 x 24.7 us on hccs: {{.*}} (predicted: -
// TINY: %sum = comm.linear_all_reduce %attn, @o_proj {group = tp} : tensor<?x4096xbf16>

builtin.module {
  nn.func @joined(%x: tensor<?x4096xbf16>, %attn: tensor<?x2048xbf16>) -> tensor<?x14336xbf16> {
    %sum = comm.linear_all_reduce %attn, @o_proj {group = tp} : tensor<?x4096xbf16>
    %x_1, %h = nn.add_rms_norm %x, %sum, @mlp_norm {eps = 1.0e-06} : tensor<?x4096xbf16>, tensor<?x4096xbf16>
    %gate_up = nn.linear %h, @gate_up_proj : tensor<?x14336xbf16>
    nn.return %gate_up
  }
}
