"""Attributes and types of our dialects, and interned constructors for them.

Every attribute that an operation of the step's graph carries comes from the cached constructors below, so
equal attributes are one object and a fingerprint may compare identities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
from xdsl.dialects.builtin import (
    DYNAMIC_INDEX,
    ArrayAttr,
    FloatAttr,
    IntegerAttr,
    StringAttr,
    SymbolRefAttr,
    TensorType,
    UnitAttr,
    bf16,
    f16,
    f32,
    f64,
    i8,
    i64,
)
from xdsl.ir import Attribute, Data, TypeAttribute
from xdsl.irdl import irdl_attr_definition
from xdsl.parser import AttrParser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from sagellm.errors import UserError

DTYPES: dict[str, Attribute] = {"float32": f32, "bfloat16": bf16, "float16": f16, "int64": i64, "int8": i8}
DTYPE_NAMES = {attr: name for name, attr in DTYPES.items()}

FLAG = UnitAttr()


@lru_cache(None)
def integer(value: int) -> IntegerAttr:
    return IntegerAttr(value, i64)


@lru_cache(None)
def number(value: float) -> FloatAttr:
    return FloatAttr(value, f64)


@lru_cache(None)
def word(value: str) -> StringAttr:
    return StringAttr(value)


@lru_cache(None)
def symbol(name: str) -> SymbolRefAttr:
    return SymbolRefAttr(name)


@lru_cache(None)
def integers(values: tuple[int, ...]) -> ArrayAttr:
    return ArrayAttr([integer(v) for v in values])


@lru_cache(None)
def words(values: tuple[str, ...]) -> ArrayAttr:
    return ArrayAttr([word(v) for v in values])


@lru_cache(None)
def tensor(dtype: str, *shape: int | None) -> TensorType:
    """A tensor type; `None` is the token count, printed as `?`."""
    return TensorType(DTYPES[dtype], [DYNAMIC_INDEX if size is None else size for size in shape])


def dtype_name(type_: Attribute) -> str:
    assert isinstance(type_, TensorType)
    return DTYPE_NAMES[type_.element_type]


def shape_of(type_: Attribute) -> tuple[int, ...]:
    assert isinstance(type_, TensorType)
    return type_.get_shape()


def last_dim(type_: Attribute) -> int:
    assert isinstance(type_, TensorType)
    if not type_.get_shape():
        raise VerifyException("wants a tensor with dimensions")
    return type_.get_shape()[-1]


class _Words(Data[tuple[str, ...]], TypeAttribute):
    """A type whose static parameters are plain words: `!batch.rows<decode, prefill, shared>`."""

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> tuple[str, ...]:
        return tuple(
            parser.parse_optional_comma_separated_list(AttrParser.Delimiter.ANGLE, parser.parse_identifier)
            or ()
        )

    def print_parameter(self, printer: Printer) -> None:
        if self.data:
            printer.print_string(f"<{', '.join(self.data)}>")


@irdl_attr_definition
class GroupType(_Words):
    """Sequences that do the same thing in this step. Words: the phase, then what passes made of it."""

    name = "batch.group"


@irdl_attr_definition
class RowsType(_Words):
    """All rows of the step on one flattened token axis. Words: the phases present, then `shared`, `cascade` or `tree`.

    These words are the static part of the model graph's key; everything else about the rows is data.
    """

    name = "batch.rows"


@irdl_attr_definition
class SamplingType(_Words):
    """The sampling columns of the output rows. Words: the stages that some row needs."""

    name = "batch.sampling"


@irdl_attr_definition
class BlocksType(_Words):
    """A set of KV blocks handed out in this step."""

    name = "kv.blocks"


@irdl_attr_definition
class PendingType(_Words):
    """A collective that is under way."""

    name = "comm.pending"


PENDING = PendingType(())
group_type = lru_cache(None)(lambda *words: GroupType(words))
rows_type = lru_cache(None)(lambda *words: RowsType(words))
sampling_type = lru_cache(None)(lambda *words: SamplingType(words))
BLOCKS = BlocksType(())


Columns = Mapping[str, np.ndarray]


class Table:
    """Per-request values of a group: named numpy columns of one length.

    Structure passes must not look inside: while `sealed`, reading a value raises.
    """

    __slots__ = ("_columns", "expanded", "rows", "sealed")

    def __init__(self, rows: int, columns: Columns | Callable[[], Columns] | None = None):
        self.rows = rows
        self._columns = columns
        self.sealed = False
        self.expanded = False

    @property
    def columns(self) -> Columns:
        if self.sealed:
            raise PermissionError(
                "a structure pass read a value of a table; only its declared facts may be read"
            )
        if self._columns is None:
            raise UserError(
                "this table has no values: the text holds only its row count; bind the step's inputs"
            )
        if callable(self._columns):
            self._columns = self._columns()
        return self._columns

    @property
    def bound(self) -> bool:
        return self._columns is not None

    def bind(self, columns: Columns) -> None:
        self._columns = columns


@irdl_attr_definition
class TableAttr(Data[Table]):
    """`#batch.table<31 rows>`; with values, one line per request: `#batch.table<2 rows, {request = 0, ...}>`."""

    name = "batch.table"

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> Table:
        with parser.in_angle_brackets():
            rows = parser.parse_integer()
            parser.parse_keyword("rows")
            columns: dict[str, list] = {}
            expanded = False
            while parser.parse_optional_punctuation(",") is not None:
                expanded = True
                for name, value in parser.parse_comma_separated_list(
                    AttrParser.Delimiter.BRACES, lambda: cls._parse_cell(parser)
                ):
                    columns.setdefault(name, []).append(value)
        for name, values in columns.items():
            if len(values) != rows:
                parser.raise_error(f"a table of {rows} rows has {len(values)} values of {name}")
        table = Table(
            rows, {name: np.array(values) for name, values in columns.items()} if expanded else None
        )
        table.expanded = expanded
        return table

    @staticmethod
    def _parse_cell(parser: AttrParser) -> tuple[str, object]:
        name = parser.parse_identifier()
        parser.parse_punctuation("=")
        return name, parser.parse_number()

    def print_parameter(self, printer: Printer) -> None:
        table = self.data
        printer.print_string(f"<{table.rows} rows")
        if table.expanded and table.bound:
            scalars = {name: column for name, column in table.columns.items() if column.ndim == 1}
            for row in range(table.rows):
                cells = ", ".join(f"{name} = {_cell(column[row])}" for name, column in scalars.items())
                printer.print_string(f",\n      {{{cells}}}")
        printer.print_string(">")


def _cell(value: np.generic) -> str:
    return real(float(value)) if isinstance(value, np.floating) else str(int(value))


def real(value: float) -> str:
    """A float as text that reads back to itself: `1.0e-06`."""
    mantissa, e, exponent = repr(value).partition("e")
    return f"{mantissa if '.' in mantissa or not mantissa.strip('-').isdigit() else mantissa + '.0'}{e}{exponent}"
