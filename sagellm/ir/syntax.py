"""One readable syntax for every operation of ours.

    %q = nn.linear %h, @q_proj {bias = @q_bias} : tensor<?x896xbf16>

The name, operands, required symbols, other properties in braces, result types. Operand types are not repeated:
a value is defined before it is used. The generic MLIR syntax is read and written too.
"""

from __future__ import annotations

import re
from typing import ClassVar

from xdsl.dialects.builtin import (
    ArrayAttr,
    DictionaryAttr,
    FloatAttr,
    IntegerAttr,
    StringAttr,
    SymbolRefAttr,
    UnitAttr,
)
from xdsl.ir import Attribute, SSAValue
from xdsl.irdl import IRDLOperation
from xdsl.parser import Parser
from xdsl.printer import Printer

from sagellm.ir.attrs import FLAG, integer, number, real, symbol, word

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*\Z")


class SageOp(IRDLOperation):
    """Base of all operations here."""

    READS: ClassVar[tuple[str, ...]] = ()
    """Resources read: `kv` (cache contents), `pool` (block ownership), `sequences`, `network`."""
    WRITES: ClassVar[tuple[str, ...]] = ()
    SYMBOLS: ClassVar[tuple[str, ...]] = ()
    """Properties printed as `@name` among the operands."""
    HINTS: ClassVar[tuple[str, ...]] = ()
    """Names that results get in a dump."""

    def result_hints(self) -> tuple[str, ...]:
        return self.HINTS

    def print(self, printer: Printer) -> None:
        separator = " "
        for operand in self.operands:
            printer.print_string(separator)
            printer.print_ssa_value(operand)
            separator = ", "
        for name in self.SYMBOLS:
            printer.print_string(separator)
            _print_value(printer, self.properties[name])
            separator = ", "
        rest = [item for item in sorted(self.properties.items()) if item[0] not in self.SYMBOLS]
        if rest:
            printer.print_string(" {")
            printer.print_list(rest, lambda item: _print_property(printer, *item))
            printer.print_string("}")
        if self.attributes:
            printer.print_op_attributes(self.attributes, print_keyword=True)
        if self.results:
            printer.print_string(" : ")
            printer.print_list(self.result_types, printer.print_attribute)
        for region in self.regions:
            printer.print_string(" ")
            printer.print_region(region)

    @classmethod
    def parse(cls, parser: Parser) -> SageOp:
        operands, properties = [], {}
        symbols = iter(cls.SYMBOLS)
        while (item := _operand(parser) or parser.parse_optional_symbol_name()) is not None:
            if isinstance(item, StringAttr):
                name = next(symbols, None)
                if name is None:
                    parser.raise_error(f"{cls.name} takes {len(cls.SYMBOLS)} symbols")
                properties[name] = symbol(item.data)
            else:
                operands.append(item)
            if parser.parse_optional_punctuation(",") is None:
                break
        if (missing := next(symbols, None)) is not None:
            parser.raise_error(f"{cls.name} wants the symbol of its {missing}, such as @name")
        if parser.parse_optional_punctuation("{") is not None:
            properties |= _parse_properties(parser)
        unknown = set(properties) - set(cls.get_irdl_definition().properties)
        if unknown:
            accepted = ", ".join(cls.get_irdl_definition().properties) or "none"
            parser.raise_error(f"unknown property {sorted(unknown)[0]} of {cls.name}; accepted: {accepted}")
        attributes = parser.parse_optional_attr_dict_with_keyword()
        types: list[Attribute] = []
        if parser.parse_optional_punctuation(":") is not None:
            types = parser.parse_comma_separated_list(parser.Delimiter.NONE, parser.parse_type)
        regions = []
        for _ in cls.get_irdl_definition().regions:
            regions.append(parser.parse_region())
        return cls.create(
            operands=operands,
            result_types=types,
            properties=properties,
            attributes=attributes.data if attributes else {},
            regions=regions,
        )


def _operand(parser: Parser) -> SSAValue | None:
    """A value that is defined already: its type is not repeated."""
    named = parser.parse_optional_unresolved_operand()
    if named is None:
        return None
    values = parser.ssa_values.get(named.operand_name, ())
    if named.index >= len(values):
        parser.raise_error(f"%{named.operand_name} is used before it is defined", named.span)
    return values[named.index]


def _print_property(printer: Printer, name: str, value: Attribute) -> None:
    printer.print_string(name)
    if not isinstance(value, UnitAttr):
        printer.print_string(" = ")
        _print_value(printer, value)


def _print_value(printer: Printer, value: Attribute) -> None:
    match value:
        case IntegerAttr():
            printer.print_string(str(value.value.data))
        case FloatAttr():
            printer.print_string(real(value.value.data))
        case StringAttr() if _IDENTIFIER.match(value.data):
            printer.print_string(value.data)
        case StringAttr():
            printer.print_string_literal(value.data)
        case SymbolRefAttr():
            printer.print_symbol_name(value.root_reference.data)
        case ArrayAttr():
            printer.print_string("[")
            printer.print_list(value.data, lambda item: _print_value(printer, item))
            printer.print_string("]")
        case DictionaryAttr():
            printer.print_string("{")
            printer.print_list(value.data.items(), lambda item: _print_property(printer, *item))
            printer.print_string("}")
        case _:
            printer.print_attribute(value)


def _parse_properties(parser: Parser) -> dict[str, Attribute]:
    """`name = value, flag}`: what stands behind an opening brace."""
    properties: dict[str, Attribute] = {}
    while parser.parse_optional_punctuation("}") is None:
        name = parser.parse_identifier(" as a property's name")
        given = parser.parse_optional_punctuation("=")
        properties[name] = FLAG if given is None else _parse_value(parser)
        parser.parse_optional_punctuation(",")
    return properties


def _parse_value(parser: Parser) -> Attribute:
    if parser.parse_optional_punctuation("[") is not None:
        items = []
        while parser.parse_optional_punctuation("]") is None:
            items.append(_parse_value(parser))
            parser.parse_optional_punctuation(",")
        return ArrayAttr(items)
    if parser.parse_optional_punctuation("{") is not None:
        return DictionaryAttr(_parse_properties(parser))
    if (name := parser.parse_optional_symbol_name()) is not None:
        return symbol(name.data)
    if (text := parser.parse_optional_str_literal()) is not None:
        return word(text)
    if (value := parser.parse_optional_number()) is not None:
        return integer(value) if isinstance(value, int) else number(value)
    if (name := parser.parse_optional_identifier()) is not None:
        return word(name)
    return parser.parse_attribute()
