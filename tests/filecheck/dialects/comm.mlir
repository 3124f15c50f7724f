// RUN: sagellm opt %s | sagellm opt | filecheck %s
// RUN: sagellm opt %s --generic | filecheck %s --check-prefix GENERIC
// RUN: sagellm opt %s --generic | sagellm opt | filecheck %s

// Collectives between the ranks of a group.

builtin.module {
  nn.func @collectives(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    // CHECK: %sum = comm.all_reduce %x {group = tp} : tensor<?x8xf32>
    // GENERIC: %sum = "comm.all_reduce"(%x) <{group = "tp"}> : (tensor<?x8xf32>) -> tensor<?x8xf32>
    %sum = comm.all_reduce %x {group = tp} : tensor<?x8xf32>
    // CHECK: %sum_1 = comm.linear_all_reduce %sum, @o_proj {group = tp} : tensor<?x8xf32>
    // GENERIC: %sum_1 = "comm.linear_all_reduce"(%sum) <{weight = @o_proj, group = "tp"}> : (tensor<?x8xf32>) -> tensor<?x8xf32>
    %sum_1 = comm.linear_all_reduce %sum, @o_proj {group = tp} : tensor<?x8xf32>
    // CHECK: %part = comm.reduce_scatter %sum {dim = 1, group = tp} : tensor<?x4xf32>
    // GENERIC: %part = "comm.reduce_scatter"(%sum) <{dim = 1 : i64, group = "tp"}> : (tensor<?x8xf32>) -> tensor<?x4xf32>
    %part = comm.reduce_scatter %sum {dim = 1, group = tp} : tensor<?x4xf32>
    // CHECK: %all = comm.all_gather %part {dim = 1, group = "tp-0"} : tensor<?x8xf32>
    // GENERIC: %all = "comm.all_gather"(%part) <{dim = 1 : i64, group = "tp-0"}> : (tensor<?x4xf32>) -> tensor<?x8xf32>
    %all = comm.all_gather %part {dim = 1, group = "tp-0"} : tensor<?x8xf32>
    // CHECK: %mine = comm.all_to_all %all {dim = 1, group = tp} : tensor<?x8xf32>
    // GENERIC: %mine = "comm.all_to_all"(%all) <{dim = 1 : i64, group = "tp"}> : (tensor<?x8xf32>) -> tensor<?x8xf32>
    %mine = comm.all_to_all %all {dim = 1, group = tp} : tensor<?x8xf32>
    nn.return %mine
  }
  nn.func @neighbours(%x: tensor<?x8xf32>, %rows: !batch.rows<decode>) -> tensor<?x8xf32> {
    // CHECK: comm.send %x {group = pp, shift = 1}
    // GENERIC: "comm.send"(%x) <{group = "pp", shift = 1 : i64}> : (tensor<?x8xf32>) -> ()
    comm.send %x {group = pp, shift = 1}
    // CHECK: %x_1 = comm.recv %rows {group = pp, shift = 1} : tensor<?x8xf32>
    // GENERIC: %x_1 = "comm.recv"(%rows) <{group = "pp", shift = 1 : i64}> : (!batch.rows<decode>) -> tensor<?x8xf32>
    %x_1 = comm.recv %rows {group = pp, shift = 1} : tensor<?x8xf32>
    nn.return %x_1
  }
  nn.func @begun(%x: tensor<?x8xf32>) -> (tensor<?x8xf32>, tensor<?x16xf32>) {
    // CHECK: %pending = comm.start %x {collective = all_reduce, group = tp} : !comm.pending
    // GENERIC: %pending = "comm.start"(%x) <{collective = "all_reduce", group = "tp"}> : (tensor<?x8xf32>) -> !comm.pending
    %pending = comm.start %x {collective = all_reduce, group = tp} : !comm.pending
    // CHECK: %pending_1 = comm.start %x {collective = all_gather, dim = 1, group = tp} : !comm.pending
    %pending_1 = comm.start %x {collective = all_gather, dim = 1, group = tp} : !comm.pending
    // CHECK: %done = comm.wait %pending_1 : tensor<?x16xf32>
    // GENERIC: %done = "comm.wait"(%pending_1) : (!comm.pending) -> tensor<?x16xf32>
    %done = comm.wait %pending_1 : tensor<?x16xf32>
    // CHECK: %done_1 = comm.wait %pending : tensor<?x8xf32>
    %done_1 = comm.wait %pending : tensor<?x8xf32>
    nn.return %done_1, %done
  }
}
