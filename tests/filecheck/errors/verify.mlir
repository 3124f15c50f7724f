// RUN: sagellm opt %s --split-input-file --verify-diagnostics | filecheck %s
// RUN: sagellm opt %s --split-input-file --verify-diagnostics --verify weak | filecheck %s --check-prefix WEAK
// RUN: sagellm opt %s --split-input-file --verify off | filecheck %s --check-prefix OFF

// Text that can be read but means nothing: one line that names the operation. `weak` looks at operand counts,
// required properties and definitions; `full` at types, symbols and weights too.

// CHECK: verify.mlir: %y = nn.add (operation 1 of @arity): has 1 operands, wants 2
// WEAK: %y = nn.add (operation 1 of @arity): has 1 operands, wants 2
// OFF: nn.func @arity
builtin.module {
  nn.func @arity(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    %y = nn.add %x : tensor<?x8xf32>
    nn.return %y
  }
}

// -----
// CHECK: verify.mlir (module from line {{[0-9]+}}): %h = nn.rms_norm (operation 1 of @property): lacks the property eps
// WEAK: %h = nn.rms_norm (operation 1 of @property): lacks the property eps
// OFF: nn.func @property
builtin.module {
  nn.func @property(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    %h = nn.rms_norm %x, @norm : tensor<?x8xf32>
    nn.return %h
  }
}

// -----
// The generic syntax can name a value that comes later.
// CHECK: %y = nn.silu (operation 1 of @order): uses a value before it is defined (made by nn.silu)
// WEAK: %y = nn.silu (operation 1 of @order): uses a value before it is defined (made by nn.silu)
// OFF: nn.func @order
builtin.module {
  nn.func @order(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    %y = "nn.silu"(%z) : (tensor<?x8xf32>) -> tensor<?x8xf32>
    %z = "nn.silu"(%x) : (tensor<?x8xf32>) -> tensor<?x8xf32>
    nn.return %z
  }
}

// -----
// CHECK: %y = nn.add (operation 1 of @types): nn.add wants one type for both inputs and the result
// WEAK: nn.func @types
builtin.module {
  nn.func @types(%x: tensor<?x8xf32>) -> tensor<?x4xf32> {
    %y = nn.add %x, %x : tensor<?x4xf32>
    nn.return %y
  }
}

// -----
// CHECK: %a, %b = nn.split (operation 1 of @sizes): nn.split of 8 into [4, 3] does not fit its results
// WEAK: nn.func @sizes
builtin.module {
  nn.func @sizes(%x: tensor<?x8xf32>) -> (tensor<?x4xf32>, tensor<?x4xf32>) {
    %a, %b = nn.split %x {sizes = [4, 3]} : tensor<?x4xf32>, tensor<?x4xf32>
    nn.return %a, %b
  }
}

// -----
// CHECK: nn.func @result: nn.return and the function's type differ
// WEAK: nn.func @result
builtin.module {
  nn.func @result(%x: tensor<?x8xf32>) -> tensor<?x4xf32> {
    nn.return %x
  }
}

// -----
// CHECK: %y = nn.linear (operation 1 of @kinds): 4 : i64 should be of base attribute string
// WEAK: nn.func @kinds
builtin.module {
  nn.func @kinds(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    %y = nn.linear %x, @w {layout = 4} : tensor<?x8xf32>
    nn.return %y
  }
}

// -----
// CHECK: %y = nn.call (operation 1 of @caller): no function @missing; accepted: @caller
// WEAK: nn.func @caller
builtin.module {
  nn.func @caller(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    %y = nn.call %x, @missing : tensor<?x8xf32>
    nn.return %y
  }
}

// -----
// CHECK: %y = nn.linear (operation 1 of @layer): no weight @b_proj in @layer; accepted: @a_proj
// WEAK: nn.func @layer
builtin.module {
  nn.func @layer(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    %y = nn.linear %x, @b_proj : tensor<?x8xf32>
    nn.return %y
  }
  weights.load @load.layer layers 0 to 1 {
    %a_proj = weights.tensor {source = "a_proj.weight"} : tensor<8x8xf32>
    weights.store %a_proj, @a_proj
  }
}

// -----
// CHECK: nn.rope_kv_write wants q_norm, k_norm and eps together, or none of them
builtin.module {
  nn.func @layer(%q: tensor<?x8xf32>, %k: tensor<?x4xf32>, %v: tensor<?x4xf32>, %angles: tensor<?x4xf32>, %rows: !batch.rows<decode>) -> tensor<?x8xf32> {
    %q_1 = nn.rope_kv_write %q, %k, %v, %angles, %rows {head_dim = 4, q_norm = @q_norm} : tensor<?x8xf32>
    nn.return %q_1
  }
}

// -----
// CHECK: %values, %scales = nn.quantize (operation 1 of @width): nn.quantize gives int8 values in the shape of its input
builtin.module {
  nn.func @width(%x: tensor<?x8xf32>) -> (tensor<?x4xi8>, tensor<?xf32>) {
    %values, %scales = nn.quantize %x : tensor<?x4xi8>, tensor<?xf32>
    nn.return %values, %scales
  }
}

// -----
// CHECK: %values, %scales = nn.quantize (operation 1 of @scales): nn.quantize gives one float32 scale for each token
builtin.module {
  nn.func @scales(%x: tensor<?x8xf32>) -> (tensor<?x8xi8>, tensor<?x8xf32>) {
    %values, %scales = nn.quantize %x : tensor<?x8xi8>, tensor<?x8xf32>
    nn.return %values, %scales
  }
}

// -----
// CHECK: nn.kv_write (operation 1 of @kept): kv_dtype is 'int4'; accepted: int8
builtin.module {
  nn.func @kept(%k: tensor<?x4xf32>, %rows: !batch.rows<decode>) -> tensor<?x4xf32> {
    nn.kv_write %k, %k, %rows {head_dim = 4, kv_dtype = int4}
    nn.return %k
  }
}
