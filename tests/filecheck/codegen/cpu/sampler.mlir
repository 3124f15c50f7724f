// RUN: sagellm opt %s --emit code | filecheck %s

// CHECK: def sample(logits, how):
// CHECK-NEXT: [[Z:[a-z_0-9]+]] = sampling.bias(logits, how.bias_rows, how.bias_tokens, how.bias)
// CHECK-NEXT: [[A:[a-z_0-9]+]] = sampling.penalize([[Z]], how.tokens, how.prompt, how.length, how.repetition, how.presence, how.frequency)
// CHECK-NEXT: [[B:[a-z_0-9]+]] = sampling.temperature_scale([[A]], how.temperature)
// CHECK-NEXT: [[C:[a-z_0-9]+]] = sampling.top_p([[B]], how.top_p)
// CHECK-NEXT: tokens = sampling.draw([[C]], how.uniform, how.greedy)
// CHECK-NEXT: return tokens
nn.func @sample(%logits: tensor<?x32xf32>, %how: !batch.sampling<bias, penalties, draw, top_p>) -> tensor<?xi64> {
  %z = nn.bias %logits, %how : tensor<?x32xf32>
  %a = nn.penalize %z, %how : tensor<?x32xf32>
  %b = nn.temperature %a, %how : tensor<?x32xf32>
  %c = nn.top_p %b, %how : tensor<?x32xf32>
  %tokens = nn.draw %c, %how : tensor<?xi64>
  nn.return %tokens
}
