"""Train the built-in model of sageLLM from scratch: a small Qwen3 decoder for English and Chinese.

    python tools/train_tiny_model.py --out sagellm/models/builtin --data-dir cache     # about half an hour
    python tools/train_tiny_model.py --out sagellm/models/builtin --data-dir cache --eval-only

The text is of two kinds. Public-domain text comes out of two Debian packages, fetched with `apt-get
download` and unpacked with `dpkg -x`: the World English Bible (sword-text-web) and the Tang and Song poems of
fortunes-zh. The rest is written by the seeded grammar of tiny_corpus.py: stories, facts, dialogues,
arithmetic, copying tasks and small code edits in both languages. The result is an ordinary Hugging Face
folder: weights, a byte-level BPE tokenizer with a chat template, configurations and a model card.
Steps, batches and seeds are fixed and nothing depends on the clock, so a second run should give the
same model up to the rounding of the machine. It needs torch, tokenizers and safetensors, two CPU cores and
4 GB.
"""

import argparse
import json
import math
import random
import tempfile
import textwrap
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_corpus import IM_END, IM_START, load_texts
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

EOT = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 4096, "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 2048, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False, "attention_dropout": 0.0,
    "initializer_range": 0.02, "use_sliding_window": False, "bos_token_id": None, "eos_token_id": 2,
    "pad_token_id": 0, "torch_dtype": "bfloat16",
}  # fmt: skip


# ---------------------------------------------------------------- tokenizer
def train_tokenizer(texts: dict[str, list[str]]) -> Tokenizer:
    """A byte-level BPE without a normalizer, so that every string comes back as it was."""
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    pattern += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=[EOT, IM_START, IM_END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=24,
    )  # fmt: skip
    part = {"book": 500, "poems": 10**9, "english": 1200, "chinese": 2400, "chat": 3000, "copies": 800}
    tok.train_from_iterator((d for kind, docs in texts.items() for d in docs[: part[kind]]), trainer)
    return tok


# ---------------------------------------------------------------- model, named as Hugging Face names Qwen3
class Norm(nn.Module):
    def __init__(self, size: int, start: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), start))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), CONFIG["rms_norm_eps"])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        h, self.d = CONFIG["hidden_size"], CONFIG["head_dim"]
        self.heads, self.kv = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
        self.q_proj = nn.Linear(h, self.heads * self.d, bias=False)
        self.k_proj = nn.Linear(h, self.kv * self.d, bias=False)
        self.v_proj = nn.Linear(h, self.kv * self.d, bias=False)
        self.o_proj = nn.Linear(self.heads * self.d, h, bias=False)
        self.q_norm, self.k_norm = Norm(self.d, 1.5), Norm(self.d, 1.5)  # 1 would be too soft to copy with

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape

        def rope(y: torch.Tensor) -> torch.Tensor:
            y1, y2 = y.chunk(2, dim=-1)
            return torch.cat((y1 * cos - y2 * sin, y2 * cos + y1 * sin), -1)

        q = rope(self.q_norm(self.q_proj(x).view(b, t, self.heads, self.d)).transpose(1, 2))
        k = rope(self.k_norm(self.k_proj(x).view(b, t, self.kv, self.d)).transpose(1, 2))
        v = self.v_proj(x).view(b, t, self.kv, self.d).transpose(1, 2)
        k, v = (y.repeat_interleave(self.heads // self.kv, dim=1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        h, m = CONFIG["hidden_size"], CONFIG["intermediate_size"]
        self.gate_proj, self.up_proj = nn.Linear(h, m, bias=False), nn.Linear(h, m, bias=False)
        self.down_proj = nn.Linear(m, h, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.input_layernorm = Norm(CONFIG["hidden_size"])
        self.post_attention_layernorm = Norm(CONFIG["hidden_size"])

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], CONFIG["hidden_size"])
        self.layers = nn.ModuleList(Layer() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = Norm(CONFIG["hidden_size"])
        half = torch.arange(0, CONFIG["head_dim"], 2) / CONFIG["head_dim"]
        angle = torch.outer(torch.arange(CONFIG["max_position_embeddings"]), CONFIG["rope_theta"] ** -half)
        self.cos, self.sin = angle.cos(), angle.sin()
        for name, p in self.named_parameters():
            if p.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.06 if "embed" in name else 0.02
                nn.init.normal_(p, std=std / (math.sqrt(2 * len(self.layers)) if deep else 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        kind = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
        cos, sin = (y[: ids.shape[1]].to(kind) for y in (self.cos, self.sin))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x) @ self.embed_tokens.weight.T


# ---------------------------------------------------------------- training
def batches(stream: torch.Tensor, starts: torch.Tensor, steps: int, tokens: int):
    """Yields (ids, targets). Every step has one length; half of the windows begin with a document."""
    rng, at = random.Random("batches"), 0
    begin = torch.zeros(len(stream), dtype=torch.long)
    begin[starts] = starts
    begin = begin.cummax(0).values
    for _ in range(steps):
        length = rng.choices((256, 512, 1024, 2048), (60, 28, 8, 4))[0]
        rows = []
        for _ in range(tokens // length):
            at = at if at + length + 1 < len(stream) else 0
            if at - begin[at] < length // 2:  # a document cut near its beginning is read from its beginning
                at = int(begin[at])
            rows.append(stream[at : at + length + 1])
            at += length
        block = torch.stack(rows)
        yield block[:, :-1], block[:, 1:]


def train(args: argparse.Namespace, texts: dict[str, list[str]], tok: Tokenizer) -> tuple[Decoder, float]:
    docs = [d for part in texts.values() for d in part]
    random.Random("order").shuffle(docs)
    ids = [[*e.ids, 0] for e in tok.encode_batch(docs)]
    stream = torch.tensor([i for d in ids for i in d])
    starts = torch.tensor([0] + [len(d) for d in ids[:-1]]).cumsum(0)
    print(f"training text: {len(docs)} documents, {len(stream)} tokens", flush=True)
    model = Decoder()
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    muon = torch.optim.Muon(
        matrices, lr=args.lr, weight_decay=0.05, ns_steps=4, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    began, mean = time.time(), 0.0
    for step, (x, y) in enumerate(batches(stream, starts, args.steps, args.tokens)):
        left = 1 - step / args.steps
        rate = args.lr * min(1.0, (step + 1) / 60, left / 0.6)
        for group in muon.param_groups + adam.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
            loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        model.zero_grad()
        mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()
        if step % 20 == 0:
            spent = time.time() - began
            print(f"step {step} loss {mean:.3f} lr {rate:.2e} {spent:.0f} s "
                  f"{(step + 1) * args.tokens / spent:.0f} tokens/s", flush=True)  # fmt: skip
        if step and step % args.save_every == 0:
            save(args.out, model, tok)
    return model, time.time() - began


# ---------------------------------------------------------------- storing, measuring, the card
def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save(out: Path, model: Decoder, tok: Tokenizer) -> None:
    """Stores the folder (all but the card); lm_head is not stored, for it is the embedding."""
    out.mkdir(parents=True, exist_ok=True)
    state = {f"model.{k}": v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    tok.save(str(out / "tokenizer.json"))
    write_json(out / "config.json", CONFIG)
    generation = {"eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": False}
    write_json(out / "generation_config.json", generation)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    special = {str(i): {"content": t, **flags} for i, t in enumerate((EOT, IM_START, IM_END))}
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": special, "bos_token": None,
        "eos_token": IM_END, "pad_token": EOT, "unk_token": None,
        "additional_special_tokens": [IM_START, IM_END],
        "clean_up_tokenization_spaces": False, "add_bos_token": False, "add_prefix_space": False,
        "model_max_length": CONFIG["max_position_embeddings"], "chat_template": CHAT_TEMPLATE,
    })  # fmt: skip


def load(out: Path) -> tuple[Decoder, Tokenizer]:
    model = Decoder()
    state = load_file(out / "model.safetensors")
    model.load_state_dict({k.removeprefix("model."): v.float() for k, v in state.items()})
    return model.eval(), Tokenizer.from_file(str(out / "tokenizer.json"))


@torch.no_grad()
def evaluate(
    model: Decoder, tok: Tokenizer, held: dict[str, list[str]]
) -> list[tuple[str, int, float, float]]:
    """For each held-out set and for all: tokens, perplexity per token, bits per byte (in pieces of 1024)."""
    rows, totals = [], [0, 0.0, 0]
    for name, docs in held.items():
        count, loss = 0, 0.0
        for doc in docs:
            ids = torch.tensor([*tok.encode(doc).ids, 0])
            for piece in ids.split(1024):
                if len(piece) > 1:
                    loss += F.cross_entropy(model(piece[None, :-1])[0], piece[1:], reduction="sum").item()
                    count += len(piece) - 1
        size = sum(len(d.encode()) for d in docs)
        rows.append((name, count, math.exp(loss / count), loss / math.log(2) / size))
        totals = [a + b for a, b in zip(totals, (count, loss, size))]
    count, loss, size = totals
    return [*rows, ("All", count, math.exp(loss / count), loss / math.log(2) / size)]


@torch.no_grad()
def greedy(model: Decoder, tok: Tokenizer, prompt: str, tokens: int = 60) -> str:
    ids = tok.encode(prompt).ids
    start = len(ids)
    while len(ids) < start + tokens:
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in (0, 2):
            break
    return tok.decode(ids[start:], skip_special_tokens=True)


CARD = """---
license: cc0-1.0
language: [en, zh]
pipeline_tag: text-generation
---
# The built-in model of sageLLM

A very small decoder for English and Chinese, so that the engine can be tried, tested and measured with
nothing to download. Architecture `Qwen3ForCausalLM`: {parameters} parameters, {layers} layers, hidden size
{hidden}, {heads} heads with {kv} key/value heads, tied embeddings, bf16. The tokenizer is a byte-level BPE of
{vocab} tokens with no normalizer, so every string round-trips. Chats are written
`<|im_start|>role\\n...<|im_end|>\\n`; a reply ends with `<|im_end|>`, a document with `<|endoftext|>`.

## Data
- The text of the World English Bible, from the Debian package `sword-text-web`: dedicated to the public
  domain.
- {poems} Tang and Song poems, from the files `tang300` and `song100` of the Debian package `fortunes-zh`: by
  authors dead for centuries, public domain. The other, modern texts of the package are not used.
- Text written by the seeded grammar in `tools/tiny_corpus.py`: stories, facts, dialogues, arithmetic,
  copying and small code edits in English and Chinese. It is part of this project.

| training text | documents | tokens |
| --- | ---: | ---: |
{data}

## Licence
The weights and the tokenizer may be used by anyone for anything (CC0 1.0).

## Training
{training}

## Perplexity on held-out text
No held-out document is in the training text. The generated ones come from the same grammar with another
seed, so their low numbers say that the grammar was learnt and nothing more. Measured with the weights as
stored (bf16), computed in fp32, each document from its beginning in pieces of at most 1024 tokens.

| text | tokens | perplexity per token | bits per byte |
| --- | ---: | ---: | ---: |
{table}

`python tools/train_tiny_model.py --out sagellm/models/builtin --data-dir cache --eval-only` prints the table
again.

## Samples
Greedy decoding, at most 60 tokens; the prompt ends at the arrow.

{samples}
## Limits
It is a toy, trained on a few million tokens. It answers greetings, what it is, and most capital cities; it
knows little beyond the sentence patterns of its grammar, and questions outside them get a wrong answer or
none. Asked for a sum, to repeat a text or to edit code it answers in the right form with the wrong content,
although it says that it can repeat text. Names in its stories change, and greedy text soon falls into loops.
Its biblical prose and its verse only sound right. Most training windows were 256 or 512 tokens, some 1024 and
2048: the context of 2048 works, but what stands far back is used weakly. Use it to see an engine at work,
never for its answers.
"""
SOURCES = {
    "book": "World English Bible, every third chapter", "poems": "poems (each twice)",
    "english": "generated English stories and facts", "chinese": "generated Chinese stories and facts",
    "chat": "generated chats in both languages", "copies": "generated copies, code edits and records",
}  # fmt: skip
SAMPLES = [
    "Once upon a time", "The capital of France is", f"{IM_START}user\n你好{IM_END}\n{IM_START}assistant\n",
    "从前，有一只", f"{IM_START}user\nWhat is sageLLM?{IM_END}\n{IM_START}assistant\n",
]  # fmt: skip


def settings(args: argparse.Namespace, seconds: float) -> str:
    """The training paragraph of the card."""
    text = (
        f"From scratch, {args.steps} steps of {args.tokens} tokens ({args.steps * args.tokens / 1e6:.1f} "
        f"million) in {seconds / 60:.0f} minutes on {args.threads} CPU cores that did other "
        "work too. Muon for the matrices and AdamW for the rest, learning rate "
        f"{args.lr:g} with 60 steps of warmup and linear decay over the last 60 %, weight decay 0.05, "
        "gradient norm at most 1, fp32 weights with bf16 autocast, windows of 256 (60 % of the steps), 512 "
        "(28 %), 1024 (8 %) and 2048 (4 %) tokens, fixed seeds."
    )
    return textwrap.fill(text, 108)


def write_card(out: Path, training: str, held: dict[str, list[str]], texts: dict[str, list[str]]) -> None:
    """Writes the card of a stored model, with its measured perplexities and samples."""
    model, tok = load(out)
    rows = evaluate(model, tok, held)
    table = "\n".join(f"| {name} | {n} | {ppl:.2f} | {bits:.3f} |" for name, n, ppl, bits in rows)
    sizes = {kind: sum(len(e.ids) for e in tok.encode_batch(docs)) for kind, docs in texts.items()}
    data = "\n".join(f"| {SOURCES[kind]} | {len(texts[kind])} | {size} |" for kind, size in sizes.items())
    samples = "".join(f"```text\n{p}⟶{greedy(model, tok, p)}\n```\n\n" for p in SAMPLES)
    card = CARD.format(
        parameters=f"{sum(p.numel() for p in model.parameters()):,}", layers=CONFIG["num_hidden_layers"],
        hidden=CONFIG["hidden_size"], heads=CONFIG["num_attention_heads"], kv=CONFIG["num_key_value_heads"],
        vocab=CONFIG["vocab_size"], poems=len(set(texts["poems"])), training=training, table=table, data=data,
        samples=samples,
    )  # fmt: skip
    (out / "README.md").write_text(card, encoding="utf-8")
    print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--data-dir", type=Path, help="where packages are kept (default: a temporary folder)")
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=300, help="steps between two intermediate saves")
    parser.add_argument("--eval-only", action="store_true", help="print the perplexities of the stored model")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        held, texts = load_texts((args.data_dir or Path(temporary)).resolve(), not args.eval_only)
    if args.eval_only:
        for name, count, ppl, bits in evaluate(*load(args.out), held):
            print(f"{name:20} {count:7} tokens  perplexity {ppl:8.2f}  {bits:.3f} bits per byte")
        return
    tok = train_tokenizer(texts)
    model, seconds = train(args, texts, tok)
    save(args.out, model, tok)
    write_card(args.out, settings(args, seconds), held, texts)


if __name__ == "__main__":
    main()
