"""What engines exchange survives every form it is written in; a document that is not so is refused in one line."""

import json

import pytest
from attrs import asdict
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from sagellm import backends, documents
from sagellm.errors import UserError
from sagellm.schemas import (
    DTYPE_BYTES,
    FLOATS,
    SPARSITY_PATTERNS,
    WEIGHT_BITS,
    AccelConfig,
    KVCacheSchema,
    QuantizationProfile,
    SpeculativeConfig,
)
from sagellm.target import INSTANCE_TYPES, CapabilityDescriptor, Figure

pytestmark = pytest.mark.contract

COUNT = st.integers(1, 2**40)
TEXT = st.text(min_size=1)
DTYPES = st.lists(st.sampled_from(list(DTYPE_BYTES)), unique=True).map(tuple)


@st.composite
def kv_schemas(draw) -> KVCacheSchema:
    dtype = draw(st.sampled_from(list(DTYPE_BYTES)))
    return KVCacheSchema(
        dtype=dtype,
        block_size=draw(COUNT),
        num_layers=draw(COUNT),
        num_kv_heads=draw(COUNT),
        head_dim=draw(COUNT),
        scale_dtype=None if dtype in FLOATS else draw(st.none() | st.sampled_from(FLOATS)),
        layout=draw(st.sampled_from(["NHD", "HND"])),
    )


@st.composite
def profiles(draw) -> QuantizationProfile:
    method, pattern = draw(st.sampled_from(list(WEIGHT_BITS))), draw(st.sampled_from(SPARSITY_PATTERNS))
    return QuantizationProfile(
        method=method,
        weight_bits=draw(st.sampled_from(WEIGHT_BITS[method])),
        activation_bits=draw(COUNT),
        kv_bits_prefill=draw(COUNT),
        kv_bits_decode=draw(COUNT),
        sparsity_pattern=pattern,
        sparsity_ratio={"none": 0.0, "2:4": 0.5}.get(pattern) or draw(st.floats(0, 1)) * (pattern != "none"),
        group_size=draw(st.none() | COUNT),
        symmetric=draw(st.booleans()),
        calibration_dataset=draw(st.none() | TEXT),
        calibration_samples=draw(st.integers(0, 2**40)),
    )


@st.composite
def speculations(draw) -> SpeculativeConfig:
    method = draw(st.sampled_from(["ngram", "draft_model", "eagle"]))
    draft = None if method == "ngram" else draw(TEXT)
    return SpeculativeConfig(method=method, draft_model=draft, num_speculative_tokens=draw(COUNT))


ACCELERATIONS = st.builds(
    AccelConfig,
    quantization=st.none() | profiles(),
    sparsity=st.sampled_from(SPARSITY_PATTERNS),
    speculative=st.none() | speculations(),
    flash_attention=st.booleans(),
    graphs=st.booleans(),
    cot_accel=st.booleans(),
)
FIGURES = st.builds(
    Figure,
    value=st.floats(allow_nan=False, allow_infinity=False),
    unit=TEXT,
    source=TEXT,
    verified=st.booleans(),
)
CAPABILITIES = st.builds(
    CapabilityDescriptor,
    backend=TEXT,
    device=TEXT,
    dtypes=DTYPES,
    kernels=st.frozensets(TEXT),
    kv_dtypes=DTYPES,
    mixed_kv=st.booleans(),
    block_sizes=st.lists(COUNT).map(tuple),
    any_block_size=st.booleans(),
    linear_layouts=st.dictionaries(st.sampled_from(FLOATS), TEXT),
    instance_type=st.sampled_from(INSTANCE_TYPES),
    max_batch_size=st.none() | COUNT,
    max_sequence_length=st.none() | COUNT,
    kv_cache_capacity=st.none() | COUNT,
    figures=st.dictionaries(TEXT, FIGURES),
    notes=st.lists(TEXT).map(tuple),
)
DOCUMENTS = st.one_of(kv_schemas(), profiles(), speculations(), ACCELERATIONS, CAPABILITIES)


@examples(200)
@given(DOCUMENTS)
def test_a_document_survives_every_form(document):
    cls = type(document)
    assert cls.from_dict(document.to_dict()) == document
    assert cls.from_json(document.to_json()) == document
    assert cls.from_yaml(document.to_yaml()) == document
    assert json.loads(document.to_json()) == document.to_dict()


@examples(50)
@given(
    TEXT
    | st.sampled_from(["off", "2:4", "1e3", "007", "null", "~", "1_000", "2026-01-01", "<<", "=", ".inf"])
)
def test_texts_stay_texts(text):
    profile = QuantizationProfile(calibration_dataset=text)
    assert QuantizationProfile.from_yaml(profile.to_yaml()) == profile


def test_what_the_cpu_can_do_survives():
    capability = backends.load("cpu").capability
    assert CapabilityDescriptor.from_yaml(capability.to_yaml()) == capability


def test_documents_written_by_hand():
    text = "schema: QuantizationProfile\nversion: 1\nsparsity_pattern: 2:4\nsparsity_ratio: 0.5\nmethod: none"
    assert QuantizationProfile.from_yaml(text) == QuantizationProfile(
        sparsity_pattern="2:4", sparsity_ratio=0.5
    )


def test_bytes_of_a_block():
    shape = {"block_size": 16, "num_layers": 2, "num_kv_heads": 4, "head_dim": 64}
    numbers = 2 * 16 * 2 * 4 * 64
    wanted = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1, "int8": 1, "int4": 0.5}
    assert wanted == DTYPE_BYTES
    for dtype, size in wanted.items():
        assert KVCacheSchema(dtype=dtype, **shape).bytes_per_block == numbers * size
    scaled = KVCacheSchema(dtype="int8", scale_dtype="fp16", **shape)
    assert scaled.bytes_per_block == numbers + 2 * numbers // 64


def test_accelerations():
    assert AccelConfig.default() == AccelConfig()
    assert not any(asdict(AccelConfig.default())[name] for name in ("flash_attention", "graphs", "cot_accel"))
    served = AccelConfig.for_inference()
    assert served.flash_attention and served.graphs and served.quantization is None


KV = {
    "schema": "KVCacheSchema", "version": 1, "dtype": "int8", "block_size": 16, "num_layers": 2, "num_kv_heads": 2,
    "head_dim": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "AccelConfig"}, "schema is 'AccelConfig'; accepted: 'KVCacheSchema'"),
        ({"schema": None}, "schema is None; accepted: 'KVCacheSchema'"),
        ({"version": 2}, "version of KVCacheSchema is 2; accepted: 1"),
        ({"version": "1"}, "version of KVCacheSchema is '1'; accepted: 1"),
        ({"version": True}, "version of KVCacheSchema is True; accepted: 1"),
        ({"blocksize": 8}, "unknown key in KVCacheSchema 'blocksize'; accepted: block_size, dtype, head_dim, layout, "
         "num_kv_heads, num_layers, scale_dtype; did you mean block_size?"),
        ({"block_size": "16"}, "block_size is '16'; accepted: a whole number of at least 1"),
        ({"block_size": 16.0}, "block_size is 16.0; accepted: a whole number of at least 1"),
        ({"num_layers": True}, "num_layers is True; accepted: a whole number of at least 1"),
        ({"dtype": 8}, f"unknown dtype '8'; accepted: {', '.join(DTYPE_BYTES)}"),
        ({"layout": "DHN"}, "unknown layout 'DHN'; accepted: NHD, HND"),
        ({"dtype": "fp16", "scale_dtype": "fp32"},
         "scale_dtype is 'float32' with dtype 'float16'; accepted: None"),
    ],
)  # fmt: skip
def test_a_document_that_is_not_so(change, message):
    for read, text in (
        (KVCacheSchema.from_dict, KV | change),
        (KVCacheSchema.from_json, json.dumps(KV | change)),
        (KVCacheSchema.from_yaml, json.dumps(KV | change)),
    ):
        with pytest.raises(UserError) as error:
            read(text)
        assert str(error.value) == message


@pytest.mark.parametrize("name", ["schema", "version", "dtype", "block_size", "num_layers", "head_dim"])
def test_a_key_that_is_missing(name):
    with pytest.raises(UserError, match=name) as error:
        KVCacheSchema.from_dict({key: value for key, value in KV.items() if key != name})
    assert "\n" not in str(error.value)


def capability(**change) -> dict:
    return backends.load("cpu").capability.to_dict() | change


FIGURE = {"value": 1.0, "unit": "GB/s", "source": "datasheet"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (capability(dtypes="float32"), "dtypes is 'float32'; accepted: a tuple (in a document, a list)"),
        (capability(dtypes=["int3"]), f"unknown dtypes 'int3'; accepted: {', '.join(DTYPE_BYTES)}"),
        (capability(kernels=[["nn.linear"]]),
         "kernels is [['nn.linear']]; accepted: a frozenset (in a document, a list)"),
        (capability(kernels=[1]), "kernels is 1; accepted: a text that is not empty"),
        (capability(instance_type="drafts"), f"unknown instance_type 'drafts'; accepted: {', '.join(INSTANCE_TYPES)}"),
        (capability(max_batch_size=0), "max_batch_size is 0; accepted: a whole number of at least 1"),
        (capability(figures=[]), "figures is []; accepted: a mapping whose keys are texts"),
        (capability(figures={"bandwidth": 7}), "Figure is 7; accepted: a mapping of its fields"),
        (capability(figures={"bandwidth": {"value": 7}}), "Figure lacks unit, source; needed: value, unit, source"),
        (capability(figures={"bandwidth": FIGURE | {"value": "7"}}), "value is '7'; accepted: a number"),
        (capability(figures={"bandwidth": FIGURE | {"source": ""}}),
         "source is ''; accepted: a text that is not empty"),
        (capability(figures={"bandwidth": FIGURE | {"verified": 1}}), "verified is 1; accepted: true or false"),
        ([], "CapabilityDescriptor is []; accepted: a mapping of its fields"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_capability_that_is_not_so(document, message):
    with pytest.raises(UserError) as error:
        CapabilityDescriptor.from_dict(document)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (QuantizationProfile, {"method": "int8"}, "weight_bits is 16 with method 'int8'; accepted: 8"),
        (QuantizationProfile, {"weight_bits": 4}, "weight_bits is 4 with method 'none'; accepted: 16, 32"),
        (QuantizationProfile, {"method": "gguf"}, f"unknown method 'gguf'; accepted: {', '.join(WEIGHT_BITS)}"),
        (QuantizationProfile, {"sparsity_pattern": "2:4"},
         "sparsity_ratio is 0.0 with sparsity_pattern '2:4'; accepted: 0.5"),
        (QuantizationProfile, {"sparsity_ratio": 0.5},
         "sparsity_ratio is 0.5 with sparsity_pattern 'none'; accepted: 0"),
        (QuantizationProfile, {"sparsity_ratio": 2},
         "sparsity_ratio is 2; accepted: a number at least 0 and at most 1"),
        (QuantizationProfile, {"group_size": 0}, "group_size is 0; accepted: a whole number of at least 1"),
        (SpeculativeConfig, {"method": "eagle"},
         "draft_model is None with method 'eagle'; accepted: a folder or hub name"),
        (SpeculativeConfig, {"method": "ngram", "draft_model": "x"},
         "draft_model is 'x' with method 'ngram'; accepted: None"),
        (AccelConfig, {"graphs": 1}, "graphs is 1; accepted: true or false"),
        (AccelConfig, {"quantization": {}}, "quantization is {}; accepted: a QuantizationProfile"),
    ],
)  # fmt: skip
def test_contradictions_and_bad_values(make, settings, message):
    with pytest.raises(UserError) as error:
        make(**settings)
    assert str(error.value) == message


@examples(100)
@given(
    st.sampled_from([KVCacheSchema, AccelConfig, CapabilityDescriptor]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    st.data(),
)
def test_nothing_but_one_line_comes_of_noise(cls, noise, data):
    """Whatever stands in a field: the document is taken, or refused in one line."""
    name = data.draw(st.sampled_from([a.name for a in cls.__attrs_attrs__]))
    base = {"KVCacheSchema": KV, "CapabilityDescriptor": capability()}.get(cls.__name__)
    document = base or AccelConfig.default().to_dict()
    try:
        cls.from_dict(document | {name: noise})
    except UserError as error:
        assert "\n" not in str(error)


@examples(200)
@given(
    st.text("?:-[]{}!&*<>|\"' \n\tab10.,#~", max_size=30)
    | st.sampled_from(
        ["int", "bool", "float", "null", "set", "map", "seq", "omap", "pairs", "timestamp", "binary", "str"]
    ).flatmap(lambda tag: st.sampled_from(["x", "[1]", "{a: 1}", "''"]).map(lambda value: f"!!{tag} {value}"))
)
def test_nothing_but_one_line_comes_of_texts_that_are_no_document(text):
    for read in (KVCacheSchema.from_yaml, KVCacheSchema.from_json):
        with pytest.raises(UserError) as error:
            read(text)
        assert len(str(error.value).splitlines()) == 1


def test_a_document_is_read_from_a_file(tmp_path):
    for name, text in (("a.yaml", "b: 1"), ("a.yml", "b: 1"), ("a.json", '{"b": 1}')):
        (tmp_path / name).write_text(text)
        assert documents.read(tmp_path / name) == {"b": 1}
    (tmp_path / "latin.json").write_bytes(b"\xff")
    for name, said in (
        ("a.txt", "accepted: a file that ends in .yaml"),
        ("none.yaml", "No such"),
        ("latin.json", "utf-8"),
    ):
        with pytest.raises(UserError, match=said) as error:
            documents.read(tmp_path / name)
        assert "\n" not in str(error.value)
    for read, text in ((documents.parse_json, '{"a": 1, "a": 2}'), (documents.parse_yaml, "a: 1\na: 2")):
        with pytest.raises(UserError, match="'a' is given twice"):
            read(text, "it")
