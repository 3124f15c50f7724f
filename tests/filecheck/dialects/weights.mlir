// RUN: sagellm opt %s | sagellm opt | filecheck %s
// RUN: sagellm opt %s --generic | filecheck %s --check-prefix GENERIC
// RUN: sagellm opt %s --generic | sagellm opt | filecheck %s

// How weights come from the checkpoint's tensors: once for a function, once per layer for a layer function.

builtin.module {
  // CHECK: weights.load @load.embed layers 0 to 1 {
  // GENERIC: "weights.load"() <{sym_name = "load.embed", first = 0 : i64, count = 1 : i64}> ({
  weights.load @load.embed layers 0 to 1 {
    // CHECK: %rope = weights.rope_table {kind = default, parameters = {rotary_dim = 4, theta = 10000.0}} : tensor<64x4xf32>
    // GENERIC: %rope = "weights.rope_table"() <{kind = "default", parameters = {rotary_dim = 4 : i64, theta = 1.000000e+04 : f64}}> : () -> tensor<64x4xf32>
    %rope = weights.rope_table {kind = default, parameters = {rotary_dim = 4, theta = 10000.0}} : tensor<64x4xf32>
    // CHECK: weights.store %rope, @rope_table
    // GENERIC: "weights.store"(%rope) <{weight = @rope_table}> : (tensor<64x4xf32>) -> ()
    weights.store %rope, @rope_table
  }
  // CHECK: weights.load @load.layers.dense layers 2 to 6 {
  // GENERIC: "weights.load"() <{sym_name = "load.layers.dense", first = 2 : i64, count = 4 : i64}> ({
  weights.load @load.layers.dense layers 2 to 6 {
    // CHECK: %q_proj = weights.tensor {source = "model.layers.{layer}.q_proj.weight"} : tensor<8x8xf32>
    // GENERIC: %q_proj = "weights.tensor"() <{source = "model.layers.{layer}.q_proj.weight"}> : () -> tensor<8x8xf32>
    %q_proj = weights.tensor {source = "model.layers.{layer}.q_proj.weight"} : tensor<8x8xf32>
    // CHECK: %k_proj = weights.tensor {source = "model.layers.{layer}.k_proj.weight"} : tensor<4x8xf32>
    // GENERIC: %k_proj = "weights.tensor"() <{source = "model.layers.{layer}.k_proj.weight"}> : () -> tensor<4x8xf32>
    %k_proj = weights.tensor {source = "model.layers.{layer}.k_proj.weight"} : tensor<4x8xf32>
    // CHECK: %o_proj = weights.tensor {dim = 1, parts = 2, source = "model.layers.{layer}.o_proj.weight"} : tensor<8x4xf32>
    // GENERIC: %o_proj = "weights.tensor"() <{dim = 1 : i64, parts = 2 : i64, source = "model.layers.{layer}.o_proj.weight"}> : () -> tensor<8x4xf32>
    %o_proj = weights.tensor {dim = 1, parts = 2, source = "model.layers.{layer}.o_proj.weight"} : tensor<8x4xf32>
    // CHECK: %o_bias = weights.tensor {once, source = "model.layers.{layer}.o_proj.bias"} : tensor<8xf32>
    // GENERIC: %o_bias = "weights.tensor"() <{once, source = "model.layers.{layer}.o_proj.bias"}> : () -> tensor<8xf32>
    %o_bias = weights.tensor {once, source = "model.layers.{layer}.o_proj.bias"} : tensor<8xf32>
    // CHECK: %qk_proj = weights.concat %q_proj, %k_proj : tensor<12x8xf32>
    // GENERIC: %qk_proj = "weights.concat"(%q_proj, %k_proj) : (tensor<8x8xf32>, tensor<4x8xf32>) -> tensor<12x8xf32>
    %qk_proj = weights.concat %q_proj, %k_proj : tensor<12x8xf32>
    // CHECK: %qk_proj_1 = weights.pack %qk_proj {layout = blocked} : tensor<12x8xf32>
    // GENERIC: %qk_proj_1 = "weights.pack"(%qk_proj) <{layout = "blocked"}> : (tensor<12x8xf32>) -> tensor<12x8xf32>
    %qk_proj_1 = weights.pack %qk_proj {layout = blocked} : tensor<12x8xf32>
    // CHECK: weights.store %qk_proj_1, @qk_proj
    // GENERIC: "weights.store"(%qk_proj_1) <{weight = @qk_proj}> : (tensor<12x8xf32>) -> ()
    weights.store %qk_proj_1, @qk_proj
    // CHECK: %next_norm = weights.tensor {last = "model.norm.weight", source = "model.layers.{layer+1}.norm.weight"} : tensor<8xf32>
    // GENERIC: %next_norm = "weights.tensor"() <{last = "model.norm.weight", source = "model.layers.{layer+1}.norm.weight"}> : () -> tensor<8xf32>
    %next_norm = weights.tensor {last = "model.norm.weight", source = "model.layers.{layer+1}.norm.weight"} : tensor<8xf32>
    // CHECK: weights.store %next_norm, @next_norm
    // GENERIC: "weights.store"(%next_norm) <{weight = @next_norm}> : (tensor<8xf32>) -> ()
    weights.store %next_norm, @next_norm
  }
}
