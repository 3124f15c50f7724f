// RUN: sagellm opt %s --split-input-file --emit code | filecheck %s

// The rows' kinds choose the attention kernel: decodes alone, prefills alone, or decodes before prefills.

// CHECK: def layer(kv, q, k, v, rows):
// CHECK-NEXT: {{aten|native}}.kv_write(kv, k, v, rows)
// CHECK-NEXT: attn = {{aten|native}}.decode_attention(q, kv, rows, 0.5)
// CHECK-NEXT: return attn
nn.func @layer(%q: tensor<?x8xf32>, %k: tensor<?x4xf32>, %v: tensor<?x4xf32>, %rows: !batch.rows<decode>) -> tensor<?x8xf32> {
  nn.kv_write %k, %v, %rows {head_dim = 4}
  %attn = nn.attention %q, %rows {head_dim = 4, kv_heads = 1, scale = 0.5} : tensor<?x8xf32>
  nn.return %attn
}
// -----
// CHECK: attn = aten.prefill_attention(q, kv, rows, 0.5, window=8)
nn.func @layer(%q: tensor<?x8xf32>, %rows: !batch.rows<prefill, shared>) -> tensor<?x8xf32> {
  %attn = nn.attention %q, %rows {head_dim = 4, kv_heads = 1, scale = 0.5, window = 8} : tensor<?x8xf32>
  nn.return %attn
}
// -----
// CHECK: attn = aten.mixed_attention({{aten|native}}.decode_attention, q, kv, rows, 0.5)
nn.func @layer(%q: tensor<?x8xf32>, %rows: !batch.rows<decode, prefill>) -> tensor<?x8xf32> {
  %attn = nn.attention %q, %rows {head_dim = 4, kv_heads = 1, scale = 0.5} : tensor<?x8xf32>
  nn.return %attn
}
// -----
// Decode rows read together; a layer with a window reads each row alone.
// CHECK: attn = {{aten|native}}.cascade_attention(q, kv, rows, 0.5)
// CHECK-NEXT: attn_2 = {{aten|native}}.decode_attention(q, kv, rows, 0.5, window=8)
nn.func @layer(%q: tensor<?x8xf32>, %rows: !batch.rows<decode, cascade>) -> tensor<?x8xf32> {
  %attn = nn.attention %q, %rows {head_dim = 4, kv_heads = 1, scale = 0.5} : tensor<?x8xf32>
  %attn_1 = nn.attention %q, %rows {head_dim = 4, kv_heads = 1, scale = 0.5, window = 8} : tensor<?x8xf32>
  nn.return %attn_1
}
// -----
// CHECK: attn = aten.mixed_attention({{aten|native}}.cascade_attention, q, kv, rows, 0.5)
nn.func @layer(%q: tensor<?x8xf32>, %rows: !batch.rows<decode, prefill, cascade, shared>) -> tensor<?x8xf32> {
  %attn = nn.attention %q, %rows {head_dim = 4, kv_heads = 1, scale = 0.5} : tensor<?x8xf32>
  nn.return %attn
}
// -----
// An int8 cache is read and written through its scales, in the type of the activations.
// CHECK: {{aten|native}}.kv_write(aten.int8(kv, torch.float32), k, v, rows)
// CHECK-NEXT: attn = {{aten|native}}.decode_attention(q, aten.int8(kv, torch.float32), rows, 0.5)
nn.func @layer(%q: tensor<?x8xf32>, %k: tensor<?x4xf32>, %v: tensor<?x4xf32>, %rows: !batch.rows<decode>) -> tensor<?x8xf32> {
  nn.kv_write %k, %v, %rows {head_dim = 4, kv_dtype = int8}
  %attn = nn.attention %q, %rows {head_dim = 4, kv_dtype = int8, kv_heads = 1, scale = 0.5} : tensor<?x8xf32>
  nn.return %attn
}
