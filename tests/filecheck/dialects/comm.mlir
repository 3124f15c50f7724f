// RUN: sagellm opt %s | sagellm opt | filecheck %s
// RUN: sagellm opt %s --generic | filecheck %s --check-prefix GENERIC
// RUN: sagellm opt %s --generic | sagellm opt | filecheck %s

// Collectives between the ranks of a group.

builtin.module {
  nn.func @collectives(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    // CHECK: %sum = comm.all_reduce %x {group = tp} : tensor<?x8xf32>
    // GENERIC: %sum = "comm.all_reduce"(%x) <{group = "tp"}> : (tensor<?x8xf32>) -> tensor<?x8xf32>
    %sum = comm.all_reduce %x {group = tp} : tensor<?x8xf32>
    // CHECK: %part = comm.reduce_scatter %sum {dim = 1, group = tp} : tensor<?x4xf32>
    // GENERIC: %part = "comm.reduce_scatter"(%sum) <{dim = 1 : i64, group = "tp"}> : (tensor<?x8xf32>) -> tensor<?x4xf32>
    %part = comm.reduce_scatter %sum {dim = 1, group = tp} : tensor<?x4xf32>
    // CHECK: %all = comm.all_gather %part {dim = 1, group = "tp-0"} : tensor<?x8xf32>
    // GENERIC: %all = "comm.all_gather"(%part) <{dim = 1 : i64, group = "tp-0"}> : (tensor<?x4xf32>) -> tensor<?x8xf32>
    %all = comm.all_gather %part {dim = 1, group = "tp-0"} : tensor<?x8xf32>
    nn.return %all
  }
}
