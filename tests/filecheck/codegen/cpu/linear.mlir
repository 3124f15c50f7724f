// RUN: sagellm opt %s -p pack-weights --emit code | filecheck %s

// A packed matrix is read by the product it was packed for; the embedding that it is tied to stays as it is.

// CHECK: def embed(w, rows):
// CHECK-NEXT: x = F.embedding(rows.tokens, w.embed_tokens)
// CHECK-NEXT: h = {{aten|native}}.rms_norm(x, w.first_norm, 1.0e-06)
// CHECK: def head(w, h, rows):
// CHECK-NEXT: last = h.index_select(0, rows.outputs)
// CHECK-NEXT: lm_head = {{native|packing}}.linear_{{onednn|panels}}(last, w.lm_head, None)
// CHECK: def load_embed(read, layer, last):
// CHECK: w.embed_tokens = embed_tokens
// CHECK: def load_head(read, layer, last):
// CHECK: lm_head = read("model.embed_tokens.weight", torch.float32)
// CHECK-NEXT: lm_head_2 = {{native|packing}}.pack_{{onednn|panels}}(lm_head)
// CHECK-NEXT: w.lm_head = lm_head_2
// CHECK: def load(read):
// CHECK: weights.embed = load_embed(read, 0, True)
// CHECK: weights.head = load_head(read, 0, True)
nn.func @embed(%rows: !batch.rows<prefill>) -> tensor<?x8xf32> {
  %x = nn.embedding %rows, @embed_tokens : tensor<?x8xf32>
  %h = nn.rms_norm %x, @first_norm {eps = 1.0e-06} : tensor<?x8xf32>
  nn.return %h
}
nn.func @head(%h: tensor<?x8xf32>, %rows: !batch.rows<prefill>) -> tensor<?x32xf32> {
  %last = nn.select_outputs %h, %rows : tensor<?x8xf32>
  %lm_head = nn.linear %last, @lm_head : tensor<?x32xf32>
  nn.return %lm_head
}
weights.load @load.embed layers 0 to 1 {
  %embed_tokens = weights.tensor {source = "model.embed_tokens.weight"} : tensor<32x8xf32>
  weights.store %embed_tokens, @embed_tokens
  %first_norm = weights.tensor {source = "model.layers.0.input_layernorm.weight"} : tensor<8xf32>
  weights.store %first_norm, @first_norm
}
weights.load @load.head layers 0 to 1 {
  %lm_head = weights.tensor {source = "model.embed_tokens.weight"} : tensor<32x8xf32>
  weights.store %lm_head, @lm_head
}
