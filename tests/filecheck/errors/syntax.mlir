// RUN: sagellm opt %s --split-input-file --verify-diagnostics | filecheck %s
// RUN: not sagellm opt %s --split-input-file 2>&1 | filecheck %s --check-prefix ONE

// Text that cannot be read: one line with the file, the line and the column. Without --verify-diagnostics the first
// one ends the run.

// ONE: sagellm opt: error: {{.*}}syntax.mlir:{{[0-9]+}}:20: %z is used before it is defined
// ONE-NOT: error

// CHECK: syntax.mlir:[[# @LINE + 3]]:20: %z is used before it is defined
builtin.module {
  nn.func @undefined_value(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    %y = nn.silu   %z : tensor<?x8xf32>
    nn.return %y
  }
}

// -----
// CHECK: syntax.mlir:[[# @LINE + 3]]:{{[0-9]+}}: Operation nn.lineal is not registered
builtin.module {
  nn.func @unknown_operation(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    %y = nn.lineal %x, @w : tensor<?x8xf32>
    nn.return %y
  }
}

// -----
// CHECK: syntax.mlir:[[# @LINE + 3]]:{{[0-9]+}}: unknown property biass of nn.linear; accepted: weight, bias, layout
builtin.module {
  nn.func @unknown_property(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    %y = nn.linear %x, @w {biass = @b} : tensor<?x8xf32>
    nn.return %y
  }
}

// -----
// CHECK: syntax.mlir:[[# @LINE + 3]]:{{[0-9]+}}: nn.linear wants the symbol of its weight, such as @name
builtin.module {
  nn.func @no_weight(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    %y = nn.linear %x : tensor<?x8xf32>
    nn.return %y
  }
}

// -----
// CHECK: syntax.mlir:[[# @LINE + 3]]:{{[0-9]+}}: {{.*}}identifier expected as a property's name
builtin.module {
  nn.func @open_brace(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    %y = nn.linear %x, @w {bias = @b : tensor<?x8xf32>
    nn.return %y
  }
}

// -----
// CHECK: syntax.mlir:[[# @LINE + 3]]:35: a string that is not closed, or has an unknown escape
builtin.module {
  weights.load @load.f layers 0 to 1 {
    %w = weights.tensor {source = "model.layers.0.mlp.a_very_long_name.weight} : tensor<8x8xf32>
    weights.store %w, @w
  }
}

// -----
// CHECK: syntax.mlir:[[# @LINE + 3]]:{{[0-9]+}}: a table of 2 rows has 1 values of row
builtin.module {
  batch.step @step {
    %g = batch.group {bucket = 2, phase = decode, table = #batch.table<2 rows, {row = 0}>} : !batch.group<decode>
    batch.commit %g
  }
}

// -----
// CHECK: syntax.mlir:[[# @LINE + 1]]:{{[0-9]+}}: Operation twelve is not registered
twelve angry men

// -----
// CHECK: syntax.mlir: nn.func @no_body: wants one region with one block, which is not empty
builtin.module {
  nn.func @no_body()
}

// -----
// CHECK: syntax.mlir: nn.silu at the top of a module; accepted: batch.step, nn.func, weights.load
builtin.module {
  nn.silu
}

// -----
// CHECK: nn.func @fine
builtin.module {
  nn.func @fine() {
    nn.return
  }
}
