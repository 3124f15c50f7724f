// RUN: sagellm opt %s --emit code | filecheck %s

// Functions that take part in collectives are given the ranks' `comm`, and hand it on; each rank reads its part of a
// weight.

// CHECK: def model(weights, cache, comm, rows):
// CHECK-NEXT:     x = embed(weights.embed, comm, rows)
// CHECK-NEXT:     x_2 = x
// CHECK-NEXT:     for w, kv in zip(weights.layers, cache[0:2]):
// CHECK-NEXT:         x_2 = layers(w, comm, x_2)
// CHECK-NEXT:     return x_2
// CHECK: def embed(w, comm, rows):
// CHECK-NEXT:     x = aten.embedding_part(rows.tokens, w.embed_tokens, comm.rank)
// CHECK-NEXT:     sum = comm.all_reduce(x)
// CHECK: def layers(w, comm, x):
// CHECK-NEXT:     y = F.linear(x, w.proj, w.bias)
// CHECK-NEXT:     a, b = aten.split_rows(y)
// CHECK-NEXT:     pending = comm.start("all_reduce", a)
// CHECK-NEXT:     part = comm.reduce_scatter(b, dim=1)
// CHECK-NEXT:     mine = comm.all_to_all(part, dim=1)
// CHECK-NEXT:     all = comm.all_gather(mine, dim=1)
// CHECK-NEXT:     done = pending.wait()
// CHECK-NEXT:     comm.send(done, 1)
// CHECK-NEXT:     x_2 = comm.recv(len(done), 8, torch.float32, 1)
// CHECK-NEXT:     x_3 = torch.cat([x_2, all])
// CHECK: embed_tokens = read("embed.weight", torch.float32, dim=0, parts=2)
// CHECK: bias = read(f"{layer}.bias", torch.float32, once=True)

builtin.module {
  nn.func @model(%rows: !batch.rows<decode>) -> tensor<?x8xf32> {
    %x = nn.call %rows, @embed : tensor<?x8xf32>
    %x_1 = nn.repeat %x, @layers {count = 2, first = 0} : tensor<?x8xf32>
    nn.return %x_1
  }
  nn.func @embed(%rows: !batch.rows<decode>) -> tensor<?x8xf32> {
    %x = nn.embedding %rows, @embed_tokens {group = tp} : tensor<?x8xf32>
    %sum = comm.all_reduce %x {group = tp} : tensor<?x8xf32>
    nn.return %sum
  }
  nn.func @layers(%x: tensor<?x8xf32>) -> tensor<?x8xf32> {
    %y = nn.linear %x, @proj {bias = @bias} : tensor<?x8xf32>
    %a, %b = nn.split_rows %y : tensor<?x8xf32>, tensor<?x8xf32>
    %pending = comm.start %a {collective = all_reduce, group = tp} : !comm.pending
    %part = comm.reduce_scatter %b {dim = 1, group = tp} : tensor<?x4xf32>
    %mine = comm.all_to_all %part {dim = 1, group = tp} : tensor<?x4xf32>
    %all = comm.all_gather %mine {dim = 1, group = tp} : tensor<?x8xf32>
    %done = comm.wait %pending : tensor<?x8xf32>
    comm.send %done {group = tp, shift = 1}
    %x_1 = comm.recv %done {group = tp, shift = 1} : tensor<?x8xf32>
    %x_2 = nn.join_rows %x_1, %all : tensor<?x8xf32>
    nn.return %x_2
  }
  weights.load @load.embed layers 0 to 1 {
    %embed_tokens = weights.tensor {dim = 0, parts = 2, source = "embed.weight"} : tensor<16x8xf32>
    weights.store %embed_tokens, @embed_tokens
  }
  weights.load @load.layers layers 0 to 2 {
    %proj = weights.tensor {source = "{layer}.weight"} : tensor<8x8xf32>
    weights.store %proj, @proj
    %bias = weights.tensor {once, source = "{layer}.bias"} : tensor<8xf32>
    weights.store %bias, @bias
  }
}
