// RUN: sagellm opt %s | sagellm opt | filecheck %s
// RUN: sagellm opt %s --generic | filecheck %s --check-prefix GENERIC
// RUN: sagellm opt %s --generic | sagellm opt | filecheck %s

// The model graph's operations, in the short syntax and in MLIR's generic one.

builtin.module {
  nn.func @model(%rows: !batch.rows<decode, prefill>) -> tensor<?x32xf32> {
    // CHECK: %x, %h, %angles = nn.call %rows, @embed : tensor<?x8xf32>, tensor<?x8xf32>, tensor<?x4xf32>
    // GENERIC: %x, %h, %angles = "nn.call"(%rows) <{callee = @embed}> : (!batch.rows<decode, prefill>) -> (tensor<?x8xf32>, tensor<?x8xf32>, tensor<?x4xf32>)
    %x, %h, %angles = nn.call %rows, @embed : tensor<?x8xf32>, tensor<?x8xf32>, tensor<?x4xf32>
    // CHECK: %x_1, %h_1 = nn.repeat %x, %h, %angles, %rows, @layers.dense {count = 2, first = 0} : tensor<?x8xf32>, tensor<?x8xf32>
    // GENERIC: %x_1, %h_1 = "nn.repeat"(%x, %h, %angles, %rows) <{callee = @layers.dense, count = 2 : i64, first = 0 : i64}> : (tensor<?x8xf32>, tensor<?x8xf32>, tensor<?x4xf32>, !batch.rows<decode, prefill>) -> (tensor<?x8xf32>, tensor<?x8xf32>)
    %x_1, %h_1 = nn.repeat %x, %h, %angles, %rows, @layers.dense {count = 2, first = 0} : tensor<?x8xf32>, tensor<?x8xf32>
    // CHECK: %logits = nn.call %h_1, %rows, @head : tensor<?x32xf32>
    // GENERIC: %logits = "nn.call"(%h_1, %rows) <{callee = @head}> : (tensor<?x8xf32>, !batch.rows<decode, prefill>) -> tensor<?x32xf32>
    %logits = nn.call %h_1, %rows, @head : tensor<?x32xf32>
    nn.return %logits
  }
  nn.func @embed(%rows: !batch.rows<decode, prefill>) -> (tensor<?x8xf32>, tensor<?x8xf32>, tensor<?x4xf32>) {
    // CHECK: %x = nn.embedding %rows, @embed_tokens : tensor<?x8xf32>
    // GENERIC: %x = "nn.embedding"(%rows) <{weight = @embed_tokens}> : (!batch.rows<decode, prefill>) -> tensor<?x8xf32>
    %x = nn.embedding %rows, @embed_tokens : tensor<?x8xf32>
    // CHECK: %part = nn.embedding %rows, @embed_tokens {group = tp} : tensor<?x8xf32>
    // GENERIC: %part = "nn.embedding"(%rows) <{weight = @embed_tokens, group = "tp"}> : (!batch.rows<decode, prefill>) -> tensor<?x8xf32>
    %part = nn.embedding %rows, @embed_tokens {group = tp} : tensor<?x8xf32>
    // CHECK: %a, %b = nn.split_rows %x : tensor<?x8xf32>, tensor<?x8xf32>
    // GENERIC: %a, %b = "nn.split_rows"(%x) : (tensor<?x8xf32>) -> (tensor<?x8xf32>, tensor<?x8xf32>)
    %a, %b = nn.split_rows %x : tensor<?x8xf32>, tensor<?x8xf32>
    // CHECK: %joined = nn.join_rows %a, %b : tensor<?x8xf32>
    // GENERIC: %joined = "nn.join_rows"(%a, %b) : (tensor<?x8xf32>, tensor<?x8xf32>) -> tensor<?x8xf32>
    %joined = nn.join_rows %a, %b : tensor<?x8xf32>
    // CHECK: %h = nn.rms_norm %x, @first_norm {eps = 1.0e-06} : tensor<?x8xf32>
    // GENERIC: %h = "nn.rms_norm"(%x) <{weight = @first_norm, eps = 1.000000e-06 : f64}> : (tensor<?x8xf32>) -> tensor<?x8xf32>
    %h = nn.rms_norm %x, @first_norm {eps = 1.0e-06} : tensor<?x8xf32>
    // CHECK: %angles = nn.rope_gather %rows, @rope_table : tensor<?x4xf32>
    // GENERIC: %angles = "nn.rope_gather"(%rows) <{weight = @rope_table}> : (!batch.rows<decode, prefill>) -> tensor<?x4xf32>
    %angles = nn.rope_gather %rows, @rope_table : tensor<?x4xf32>
    // CHECK: %angles_1 = nn.rope_dynamic %rows {factor = 4.0, original = 64, theta = 10000.0} : tensor<?x4xf32>
    // GENERIC: %angles_1 = "nn.rope_dynamic"(%rows) <{factor = 4.000000e+00 : f64, original = 64 : i64, theta = 1.000000e+04 : f64}> : (!batch.rows<decode, prefill>) -> tensor<?x4xf32>
    %angles_1 = nn.rope_dynamic %rows {factor = 4.0, original = 64, theta = 10000.0} : tensor<?x4xf32>
    nn.return %x, %h, %angles_1
  }
  nn.func @layers.dense(%x: tensor<?x8xf32>, %h: tensor<?x8xf32>, %angles: tensor<?x4xf32>, %rows: !batch.rows<decode, prefill>) -> (tensor<?x8xf32>, tensor<?x8xf32>) {
    // CHECK: %qkv = nn.linear %h, @qkv_proj {bias = @qkv_bias, layout = blocked} : tensor<?x16xf32>
    // GENERIC: %qkv = "nn.linear"(%h) <{weight = @qkv_proj, bias = @qkv_bias, layout = "blocked"}> : (tensor<?x8xf32>) -> tensor<?x16xf32>
    %qkv = nn.linear %h, @qkv_proj {bias = @qkv_bias, layout = blocked} : tensor<?x16xf32>
    // CHECK: %q, %k, %v = nn.split %qkv {sizes = [8, 4, 4]} : tensor<?x8xf32>, tensor<?x4xf32>, tensor<?x4xf32>
    // GENERIC: %q, %k, %v = "nn.split"(%qkv) <{sizes = [8 : i64, 4 : i64, 4 : i64]}> : (tensor<?x16xf32>) -> (tensor<?x8xf32>, tensor<?x4xf32>, tensor<?x4xf32>)
    %q, %k, %v = nn.split %qkv {sizes = [8, 4, 4]} : tensor<?x8xf32>, tensor<?x4xf32>, tensor<?x4xf32>
    // CHECK: %q_1 = nn.rms_norm %q, @q_norm {eps = 1.0e-06, heads = 2} : tensor<?x8xf32>
    // GENERIC: %q_1 = "nn.rms_norm"(%q) <{weight = @q_norm, eps = 1.000000e-06 : f64, heads = 2 : i64}> : (tensor<?x8xf32>) -> tensor<?x8xf32>
    %q_1 = nn.rms_norm %q, @q_norm {eps = 1.0e-06, heads = 2} : tensor<?x8xf32>
    // CHECK: %q_2, %k_1 = nn.rope %q_1, %k, %angles {head_dim = 4} : tensor<?x8xf32>, tensor<?x4xf32>
    // GENERIC: %q_2, %k_1 = "nn.rope"(%q_1, %k, %angles) <{head_dim = 4 : i64}> : (tensor<?x8xf32>, tensor<?x4xf32>, tensor<?x4xf32>) -> (tensor<?x8xf32>, tensor<?x4xf32>)
    %q_2, %k_1 = nn.rope %q_1, %k, %angles {head_dim = 4} : tensor<?x8xf32>, tensor<?x4xf32>
    // CHECK: nn.kv_write %k_1, %v, %rows {head_dim = 4}
    // GENERIC: "nn.kv_write"(%k_1, %v, %rows) <{head_dim = 4 : i64}> : (tensor<?x4xf32>, tensor<?x4xf32>, !batch.rows<decode, prefill>) -> ()
    nn.kv_write %k_1, %v, %rows {head_dim = 4}
    // CHECK: %q_3 = nn.rope_kv_write %q, %k, %v, %angles, %rows {head_dim = 4} : tensor<?x8xf32>
    // GENERIC: %q_3 = "nn.rope_kv_write"(%q, %k, %v, %angles, %rows) <{head_dim = 4 : i64}> : (tensor<?x8xf32>, tensor<?x4xf32>, tensor<?x4xf32>, tensor<?x4xf32>, !batch.rows<decode, prefill>) -> tensor<?x8xf32>
    %q_3 = nn.rope_kv_write %q, %k, %v, %angles, %rows {head_dim = 4} : tensor<?x8xf32>
    // CHECK: %q_4 = nn.rope_kv_write %q, %k, %v, %angles, %rows {eps = 1.0e-06, head_dim = 4, k_norm = @k_norm, q_norm = @q_norm} : tensor<?x8xf32>
    // GENERIC: "nn.rope_kv_write"(%q, %k, %v, %angles, %rows) <{eps = 1.000000e-06 : f64, head_dim = 4 : i64, k_norm = @k_norm, q_norm = @q_norm}>
    %q_4 = nn.rope_kv_write %q, %k, %v, %angles, %rows {eps = 1.0e-06, head_dim = 4, k_norm = @k_norm, q_norm = @q_norm} : tensor<?x8xf32>
    // CHECK: %attn = nn.attention %q_2, %rows {head_dim = 4, kv_heads = 1, scale = 0.5, window = 16} : tensor<?x8xf32>
    // GENERIC: %attn = "nn.attention"(%q_2, %rows) <{head_dim = 4 : i64, kv_heads = 1 : i64, scale = 5.000000e-01 : f64, window = 16 : i64}> : (tensor<?x8xf32>, !batch.rows<decode, prefill>) -> tensor<?x8xf32>
    %attn = nn.attention %q_2, %rows {head_dim = 4, kv_heads = 1, scale = 0.5, window = 16} : tensor<?x8xf32>
    // CHECK: nn.kv_write %k_1, %v, %rows {head_dim = 4, kv_dtype = int8}
    nn.kv_write %k_1, %v, %rows {head_dim = 4, kv_dtype = int8}
    // CHECK: %attn_1 = nn.attention %q_2, %rows {head_dim = 4, kv_dtype = int8, kv_heads = 1, scale = 0.5} : tensor<?x8xf32>
    %attn_1 = nn.attention %q_2, %rows {head_dim = 4, kv_dtype = int8, kv_heads = 1, scale = 0.5} : tensor<?x8xf32>
    // CHECK: %x_1, %h_1 = nn.add_rms_norm %x, %attn, @mlp_norm {eps = 1.0e-06} : tensor<?x8xf32>, tensor<?x8xf32>
    // GENERIC: %x_1, %h_1 = "nn.add_rms_norm"(%x, %attn) <{weight = @mlp_norm, eps = 1.000000e-06 : f64}> : (tensor<?x8xf32>, tensor<?x8xf32>) -> (tensor<?x8xf32>, tensor<?x8xf32>)
    %x_1, %h_1 = nn.add_rms_norm %x, %attn, @mlp_norm {eps = 1.0e-06} : tensor<?x8xf32>, tensor<?x8xf32>
    // CHECK: %values, %scales = nn.quantize %h_1 : tensor<?x8xi8>, tensor<?xf32>
    // GENERIC: %values, %scales = "nn.quantize"(%h_1) : (tensor<?x8xf32>) -> (tensor<?x8xi8>, tensor<?xf32>)
    %values, %scales = nn.quantize %h_1 : tensor<?x8xi8>, tensor<?xf32>
    // CHECK: %values_1, %scales_1 = nn.rms_norm_quantize %x, @mlp_norm {eps = 1.0e-06} : tensor<?x8xi8>, tensor<?xf32>
    // GENERIC: %values_1, %scales_1 = "nn.rms_norm_quantize"(%x) <{weight = @mlp_norm, eps = 1.000000e-06 : f64}> : (tensor<?x8xf32>) -> (tensor<?x8xi8>, tensor<?xf32>)
    %values_1, %scales_1 = nn.rms_norm_quantize %x, @mlp_norm {eps = 1.0e-06} : tensor<?x8xi8>, tensor<?xf32>
    // CHECK: %total, %values_2, %scales_2 = nn.add_rms_norm_quantize %x, %attn, @mlp_norm {eps = 1.0e-06} : tensor<?x8xf32>, tensor<?x8xi8>, tensor<?xf32>
    // GENERIC: %total, %values_2, %scales_2 = "nn.add_rms_norm_quantize"(%x, %attn) <{weight = @mlp_norm, eps = 1.000000e-06 : f64}> : (tensor<?x8xf32>, tensor<?x8xf32>) -> (tensor<?x8xf32>, tensor<?x8xi8>, tensor<?xf32>)
    %total, %values_2, %scales_2 = nn.add_rms_norm_quantize %x, %attn, @mlp_norm {eps = 1.0e-06} : tensor<?x8xf32>, tensor<?x8xi8>, tensor<?xf32>
    // CHECK: %gate_up = nn.linear %h_1, @gate_up_proj : tensor<?x16xf32>
    // GENERIC: %gate_up = "nn.linear"(%h_1) <{weight = @gate_up_proj}> : (tensor<?x8xf32>) -> tensor<?x16xf32>
    %gate_up = nn.linear %h_1, @gate_up_proj : tensor<?x16xf32>
    // CHECK: %m = nn.silu_mul %gate_up : tensor<?x8xf32>
    // GENERIC: %m = "nn.silu_mul"(%gate_up) : (tensor<?x16xf32>) -> tensor<?x8xf32>
    %m = nn.silu_mul %gate_up : tensor<?x8xf32>
    // CHECK: %act = nn.silu %m : tensor<?x8xf32>
    // GENERIC: %act = "nn.silu"(%m) : (tensor<?x8xf32>) -> tensor<?x8xf32>
    %act = nn.silu %m : tensor<?x8xf32>
    // CHECK: %m_1 = nn.mul %act, %m : tensor<?x8xf32>
    // GENERIC: %m_1 = "nn.mul"(%act, %m) : (tensor<?x8xf32>, tensor<?x8xf32>) -> tensor<?x8xf32>
    %m_1 = nn.mul %act, %m : tensor<?x8xf32>
    // CHECK: %x_2 = nn.add %x_1, %m_1 : tensor<?x8xf32>
    // GENERIC: %x_2 = "nn.add"(%x_1, %m_1) : (tensor<?x8xf32>, tensor<?x8xf32>) -> tensor<?x8xf32>
    %x_2 = nn.add %x_1, %m_1 : tensor<?x8xf32>
    nn.return %x_2, %h_1
  }
  nn.func @head(%h: tensor<?x8xf32>, %rows: !batch.rows<decode, prefill>) -> tensor<?x32xf32> {
    // CHECK: %last = nn.select_outputs %h, %rows : tensor<?x8xf32>
    // GENERIC: %last = "nn.select_outputs"(%h, %rows) : (tensor<?x8xf32>, !batch.rows<decode, prefill>) -> tensor<?x8xf32>
    %last = nn.select_outputs %h, %rows : tensor<?x8xf32>
    // CHECK: %half = nn.cast %last : tensor<?x8xbf16>
    // GENERIC: %half = "nn.cast"(%last) : (tensor<?x8xf32>) -> tensor<?x8xbf16>
    %half = nn.cast %last : tensor<?x8xbf16>
    // CHECK: %logits = nn.linear %half, @lm_head : tensor<?x32xbf16>
    // GENERIC: %logits = "nn.linear"(%half) <{weight = @lm_head}> : (tensor<?x8xbf16>) -> tensor<?x32xbf16>
    %logits = nn.linear %half, @lm_head : tensor<?x32xbf16>
    // CHECK: %logits_1 = nn.cast %logits : tensor<?x32xf32>
    // GENERIC: %logits_1 = "nn.cast"(%logits) : (tensor<?x32xbf16>) -> tensor<?x32xf32>
    %logits_1 = nn.cast %logits : tensor<?x32xf32>
    nn.return %logits_1
  }
  nn.func @sample(%logits: tensor<?x32xf32>, %how: !batch.sampling<penalties, draw, top_k, top_p, min_p>) -> tensor<?xi64> {
    // CHECK: %logits_1 = nn.penalize %logits, %how : tensor<?x32xf32>
    // GENERIC: %logits_1 = "nn.penalize"(%logits, %how) : (tensor<?x32xf32>, !batch.sampling<penalties, draw, top_k, top_p, min_p>) -> tensor<?x32xf32>
    %logits_1 = nn.penalize %logits, %how : tensor<?x32xf32>
    // CHECK: %logits_2 = nn.temperature %logits_1, %how : tensor<?x32xf32>
    // GENERIC: %logits_2 = "nn.temperature"(%logits_1, %how) : (tensor<?x32xf32>, !batch.sampling<penalties, draw, top_k, top_p, min_p>) -> tensor<?x32xf32>
    %logits_2 = nn.temperature %logits_1, %how : tensor<?x32xf32>
    // CHECK: %logits_3 = nn.top_k %logits_2, %how : tensor<?x32xf32>
    // GENERIC: %logits_3 = "nn.top_k"(%logits_2, %how) : (tensor<?x32xf32>, !batch.sampling<penalties, draw, top_k, top_p, min_p>) -> tensor<?x32xf32>
    %logits_3 = nn.top_k %logits_2, %how : tensor<?x32xf32>
    // CHECK: %logits_4 = nn.top_p %logits_3, %how : tensor<?x32xf32>
    // GENERIC: %logits_4 = "nn.top_p"(%logits_3, %how) : (tensor<?x32xf32>, !batch.sampling<penalties, draw, top_k, top_p, min_p>) -> tensor<?x32xf32>
    %logits_4 = nn.top_p %logits_3, %how : tensor<?x32xf32>
    // CHECK: %logits_5 = nn.min_p %logits_4, %how : tensor<?x32xf32>
    // GENERIC: %logits_5 = "nn.min_p"(%logits_4, %how) : (tensor<?x32xf32>, !batch.sampling<penalties, draw, top_k, top_p, min_p>) -> tensor<?x32xf32>
    %logits_5 = nn.min_p %logits_4, %how : tensor<?x32xf32>
    // CHECK: %tokens = nn.draw %logits_5, %how : tensor<?xi64>
    // GENERIC: %tokens = "nn.draw"(%logits_5, %how) : (tensor<?x32xf32>, !batch.sampling<penalties, draw, top_k, top_p, min_p>) -> tensor<?xi64>
    %tokens = nn.draw %logits_5, %how : tensor<?xi64>
    nn.return %tokens
  }
  nn.func @both(%logits: tensor<?x32xf32>, %how: !batch.sampling<draw, top_k, top_p>) -> tensor<?xi64> {
    // CHECK: %logits_1 = nn.top_k_top_p %logits, %how : tensor<?x32xf32>
    // GENERIC: %logits_1 = "nn.top_k_top_p"(%logits, %how) : (tensor<?x32xf32>, !batch.sampling<draw, top_k, top_p>) -> tensor<?x32xf32>
    %logits_1 = nn.top_k_top_p %logits, %how : tensor<?x32xf32>
    %tokens = nn.draw %logits_1, %how : tensor<?xi64>
    nn.return %tokens
  }
  nn.func @greedy(%logits: tensor<?x32xf32>, %how: !batch.sampling) -> tensor<?xi64> {
    // CHECK: %tokens = nn.argmax %logits : tensor<?xi64>
    // GENERIC: %tokens = "nn.argmax"(%logits) : (tensor<?x32xf32>) -> tensor<?xi64>
    %tokens = nn.argmax %logits : tensor<?xi64>
    nn.return %tokens
  }
  nn.func @biased(%logits: tensor<?x32xf32>, %how: !batch.sampling<bias>) -> tensor<?xi64> {
    // CHECK: %logits_1 = nn.bias %logits, %how : tensor<?x32xf32>
    // GENERIC: %logits_1 = "nn.bias"(%logits, %how) : (tensor<?x32xf32>, !batch.sampling<bias>) -> tensor<?x32xf32>
    %logits_1 = nn.bias %logits, %how : tensor<?x32xf32>
    %tokens = nn.argmax %logits_1 : tensor<?xi64>
    nn.return %tokens
  }
  nn.func @allowed(%logits: tensor<?x32xf32>, %how: !batch.sampling<grammar>) -> tensor<?xi64> {
    // CHECK: %logits_1 = nn.allow %logits, %how : tensor<?x32xf32>
    // GENERIC: %logits_1 = "nn.allow"(%logits, %how) : (tensor<?x32xf32>, !batch.sampling<grammar>) -> tensor<?x32xf32>
    %logits_1 = nn.allow %logits, %how : tensor<?x32xf32>
    %tokens = nn.argmax %logits_1 : tensor<?xi64>
    nn.return %tokens
  }
  nn.func @vectors(%h: tensor<?x8xf32>, %rows: !batch.rows<prefill>) -> tensor<?x8xf32> {
    // CHECK: %vectors = nn.pool %h, %rows {kind = mean} : tensor<?x8xf32>
    // GENERIC: %vectors = "nn.pool"(%h, %rows) <{kind = "mean"}> : (tensor<?x8xf32>, !batch.rows<prefill>) -> tensor<?x8xf32>
    %vectors = nn.pool %h, %rows {kind = mean} : tensor<?x8xf32>
    nn.return %vectors
  }
}
