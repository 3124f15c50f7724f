// RUN: sagellm opt %s --split-input-file -p pack-weights --remarks --layout float32=blocked | filecheck %s
// RUN: sagellm opt %s --split-input-file -p pack-weights --remarks --layout float32= \
// RUN:     | filecheck %s --check-prefix PLAIN

// The matrix is packed where it is stored, and every linear that reads it says so. A norm's weight stays.

// CHECK: // pack-weights: applied at %a = nn.linear (operation 2 of @layer): @a_proj is packed as blocked
// CHECK-NEXT: builtin.module
// CHECK: %a = nn.linear %h, @a_proj {layout = blocked} : tensor<?x8xf32>
// CHECK-NEXT: %a_1 = nn.linear %a, @a_proj {layout = blocked} : tensor<?x8xf32>
// CHECK: weights.load @load.layer
// CHECK: %a_proj = weights.tensor {source = "layers.{layer}.a_proj.weight"} : tensor<8x8xf32>
// CHECK-NEXT: %a_proj_1 = weights.pack %a_proj {layout = blocked} : tensor<8x8xf32>
// CHECK-NEXT: weights.store %a_proj_1, @a_proj
// CHECK-NEXT: %norm = weights.tensor
// CHECK-NEXT: weights.store %norm, @norm

// PLAIN: // pack-weights: declined at %a = nn.linear (operation 2 of @layer): cpu names no layout for float32
// PLAIN: %a = nn.linear %h, @a_proj : tensor<?x8xf32>
// PLAIN-NOT: weights.pack

builtin.module {
  nn.func @layer(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    %h = nn.rms_norm %x, @norm {eps = 1.0e-06} : tensor<?x8xf32>
    %a = nn.linear %h, @a_proj : tensor<?x8xf32>
    %a_1 = nn.linear %a, @a_proj : tensor<?x8xf32>
    nn.return %a_1
  }
  weights.load @load.layer layers 0 to 2 {
    %a_proj = weights.tensor {source = "layers.{layer}.a_proj.weight"} : tensor<8x8xf32>
    weights.store %a_proj, @a_proj
    %norm = weights.tensor {source = "layers.{layer}.norm.weight"} : tensor<8xf32>
    weights.store %norm, @norm
  }
}

// -----
// One matrix for the embedding and the output projection, in one function: the embedding could not read it packed.

// CHECK: // pack-weights: declined at %table = nn.linear (operation 2 of @tied): @table is read by other operations or not stored by the weights program
// CHECK: nn.linear %x, @table : tensor<?x32xf32>
// CHECK-NOT: weights.pack

builtin.module {
  nn.func @tied(%rows: !batch.rows<decode>) -> tensor<?x32xf32> {
    %x = nn.embedding %rows, @table : tensor<?x8xf32>
    %table = nn.linear %x, @table : tensor<?x32xf32>
    nn.return %table
  }
  weights.load @load.tied layers 0 to 1 {
    %table = weights.tensor {source = "embed_tokens.weight"} : tensor<32x8xf32>
    weights.store %table, @table
  }
}

// -----
// A packed linear is not packed again, and one without a weights program is left alone.

// CHECK: // pack-weights: declined at %b = nn.linear (operation 2 of @half): @b_proj is read by other operations or not stored by the weights program
// CHECK: %a = nn.linear %x, @a_proj {layout = tiled} : tensor<?x8xf32>
// CHECK-NEXT: %b = nn.linear %a, @b_proj : tensor<?x8xf32>

builtin.module {
  nn.func @half(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    %a = nn.linear %x, @a_proj {layout = tiled} : tensor<?x8xf32>
    %b = nn.linear %a, @b_proj : tensor<?x8xf32>
    nn.return %b
  }
}
