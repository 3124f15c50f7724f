// RUN: sagellm opt %s --load-pass %S/drop_identity.py:DropIdentity -p drop-identity --remarks | filecheck %s
// RUN: sagellm opt %s --load-pass %S/drop_identity.py:DropIdentity -p drop-identity{padded=true} --remarks \
// RUN:     | filecheck %s --check-prefix PADDED

// CHECK: // drop-identity: applied at %last = nn.select_outputs (operation 1 of @head): every row of a decode step gets a token
// CHECK-NEXT: // drop-identity: applied at %same = nn.cast (operation 1 of @head): the value has this type already
// CHECK-NEXT: // drop-identity: declined at %last = nn.select_outputs (operation 1 of @mixed): not every row of decode and prefill gets a token
// CHECK: nn.func @head
// CHECK-NEXT: %logits = nn.linear %h, @lm_head : tensor<?x32xbf16>
// CHECK-NEXT: %wide = nn.cast %logits : tensor<?x32xf32>
// CHECK-NEXT: nn.return %wide
// CHECK: nn.func @mixed
// CHECK-NEXT: nn.select_outputs

// PADDED: // drop-identity: declined at %last = nn.select_outputs (operation 1 of @head): decode rows are padded
// PADDED: nn.select_outputs

builtin.module {
  nn.func @head(%h: tensor<?x8xbf16>, %rows: !batch.rows<decode>) -> tensor<?x32xf32> {
    %last = nn.select_outputs %h, %rows : tensor<?x8xbf16>
    %same = nn.cast %last : tensor<?x8xbf16>
    %logits = nn.linear %same, @lm_head : tensor<?x32xbf16>
    %wide = nn.cast %logits : tensor<?x32xf32>
    nn.return %wide
  }
  nn.func @mixed(%h: tensor<?x8xbf16>, %rows: !batch.rows<decode, prefill>) -> tensor<?x8xbf16> {
    %last = nn.select_outputs %h, %rows : tensor<?x8xbf16>
    nn.return %last
  }
}
