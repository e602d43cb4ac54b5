"""The functions of the lint's rules, which yield lines with details."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from ..device import MAX_BUFFERS, MAX_THREADGROUP_BYTES
from ..engine.metal.expression import evaluate
from ..engine.metal.tokens import Function, Scan, Token, Tokens, matching, split

Found = Iterator[tuple[int, str]]
SPACES = {"device", "constant", "thread", "threadgroup", "threadgroup_imageblock"}
SPACES |= {"ray_data", "object_data"}
_VECTOR = re.compile(
    r"(?:packed_)?(?:float|half|bfloat|u?int|u?short|u?char|u?long|bool)[234]"
)
_BYTES: Mapping[str, int] = {
    "float": 4,
    "int": 4,
    "uint": 4,
    "half": 2,
    "bfloat": 2,
    "bfloat16_t": 2,
    "float16_t": 2,
    "short": 2,
    "ushort": 2,
    "char": 1,
    "uchar": 1,
    "bool": 1,
    "long": 8,
    "ulong": 8,
}
_NOT_TYPES = {"return", "else", "case", "goto", "delete", "new", "sizeof", "operator"}
_STARTS = {";", "{", "}", ")", ":"}


def words(listed: str) -> Callable[[Scan], Found]:
    """Return a rule that refuses words anywhere."""
    refused = set(listed.split())

    def find(source: Scan) -> Found:
        before = Token("", "mark", 0)
        for token in (*source.tokens, *source.macros):
            deleted = token.text == "delete" and before.text == "="
            if token.kind == "name" and token.text in refused and not deleted:
                yield token.line, token.text
            before = token

    return find


def texts(tokens: Tokens, i: int, n: int) -> list[str]:
    """Return the texts of ``n`` tokens from ``i`` on, fewer at the end."""
    return [t.text for t in tokens[max(i, 0) : i + n]]


def lambdas(source: Scan) -> Found:
    """Find ``[...](`` and ``[...]{`` where nothing is indexed."""
    tokens = (*source.tokens, *source.macros)
    for i, token in enumerate(tokens):
        if token.text != "[" or texts(tokens, i + 1, 1) == ["["]:
            continue
        before = tokens[i - 1] if i else token
        indexed = before.kind in ("name", "string") and before.text != "return"
        after = texts(tokens, matching(tokens, i) + 1, 1)
        if (
            not indexed
            and before.text not in ("]", ")", "[")
            and after
            in (
                ["("],
                ["{"],
            )
        ):
            yield token.line, "[...]"


def doubles(source: Scan) -> Found:
    """Find C++ types and literals of 64 bits or more that Metal lacks."""
    tokens = (*source.tokens, *source.macros)
    for i, token in enumerate(tokens):
        pair = texts(tokens, i, 2)
        if re.fullmatch(r"(packed_)?double[234]?", token.text):
            yield token.line, token.text
        elif pair in (["long", "double"], ["long", "long"]):
            yield token.line, " ".join(pair)
        elif re.fullmatch(r"(\d+\.\d*|\.\d+|\d+e[+-]?\d+)(e[+-]?\d+)?l", token.text, 2):
            yield token.line, token.text


def std(source: Scan) -> Found:
    """Find ``std::``."""
    tokens = (*source.tokens, *source.macros)
    for i, token in enumerate(tokens):
        if texts(tokens, i, 2) == ["std", "::"]:
            yield token.line, "".join(texts(tokens, i, 3))


def strings(source: Scan) -> Found:
    """Find string literals in bodies, except in attributes, static_assert and logs."""
    for function in source.functions:
        body, i = function.body, 0
        while i < len(body):
            logs = body[i].text.startswith("log_") and body[i - 1].text == "."
            if logs or body[i].text in ("static_assert", "_Pragma"):
                i = matching(body, i + 1)
            elif texts(body, i, 2) == ["[", "["]:
                i = matching(body, i)
            elif body[i].kind == "string" and body[i].text.startswith('"'):
                yield body[i].line, body[i].text
            i += 1


def recursion(source: Scan) -> Found:
    """Find call cycles; overloads that only argument types distinguish are skipped."""
    calls = {id(f): set(_callees(f, source.functions)) for f in source.functions}
    for function in source.functions:
        reached: set[int] = set()
        waiting = set(calls[id(function)])
        while waiting:
            callee = waiting.pop()
            if callee not in reached:
                reached.add(callee)
                waiting |= calls[callee]
        if id(function) in reached:
            yield function.name.line, function.name.text


def _callees(function: Function, functions: list[Function]) -> Iterator[int]:
    body = function.body
    for i, token in enumerate(body):
        if token.kind != "name" or texts(body, i + 1, 1) != ["("]:
            continue
        if i and body[i - 1].text in (".", "->", "::"):
            continue
        n_given = len(split(body[i + 2 : matching(body, i + 1)]))
        same = [f for f in functions if f.name.text == token.text]
        taking = [f for f in same if _takes(f, n_given)]
        if len(taking) == 1:
            yield id(taking[0])


def _takes(function: Function, n_given: int) -> bool:
    n_default = sum(any(t.text == "=" for t in p) for p in function.parameters)
    n = len(function.parameters)
    return n - n_default <= n_given <= n


def static_locals(source: Scan) -> Found:
    """Find ``static`` in bodies unless ``constant`` too."""
    for function in source.functions:
        for i, token in enumerate(function.body):
            near = texts(function.body, i - 2, 5)
            if token.text == "static" and "constant" not in near:
                yield token.line, " ".join(texts(function.body, i, 3))


def members_without_space(source: Scan) -> Found:
    """Find member functions that do not name their object's address space."""
    for function in source.functions:
        belongs = not {"static", "friend"} & {t.text for t in function.head}
        tail = function.tail
        if texts(tail, 0, 1) == ["("]:
            # The parameters of ``operator()`` come after its name's.
            tail = tail[matching(tail, 0) + 1 :]
        ends = [t.text for t in tail if t.text != "const"]
        if function.is_member and belongs and not SPACES & set(ends[:1]):
            yield function.name.line, function.name.text


_DECLARES = {"using", "typedef", "struct", "class", "enum", "union", "template"}
_DECLARES |= {"static_assert", "namespace", "extern", "friend", "operator"}


def program_variables(source: Scan) -> Found:
    """Find variables outside functions that are not ``constant``."""
    for statement in source.program:
        if _declares_variable(statement):
            yield statement[0].line, " ".join(texts(statement, 0, 4))
    for statement in source.members:
        if texts(statement, 0, 1) == ["static"] and _declares_variable(statement):
            yield statement[0].line, " ".join(texts(statement, 0, 4))


def _declares_variable(statement: Tokens) -> bool:
    words = [t.text for t in statement]
    if "constant" in words or "sampler" in words or _DECLARES & set(words[:2]):
        return False
    ends = [words.index(c) for c in "=[{" if c in words] or [len(words)]
    head = words[: min(ends)]
    # A macro may contain the address space.
    has_macro = any(re.fullmatch(r"[A-Z][A-Z_\d]+", word) for word in head[:-1])
    names = [t for t in statement[: len(head)] if t.kind == "name"]
    return "(" not in head and not has_macro and len(names) > 1


def _threadgroup_declarations(body: Tokens) -> Iterator[Tokens]:
    """Yield declarations of threadgroup memory, but not of pointers to it."""
    for i, token in enumerate(body):
        if token.text != "threadgroup":
            continue
        end = next((j for j in range(i, len(body)) if body[j].text == ";"), len(body))
        declaration = body[i:end]
        head: list[str] = []
        for t in declaration:
            if t.text in ("[", "=", "{") or (t.text == "," and "<" not in head):
                break
            head.append(t.text)
        starts = i == 0 or body[i - 1].text in (*_STARTS, "constexpr", "const")
        if starts and len(head) > 2 and not {"*", "&", ")", "("} & set(head):
            yield declaration


def threadgroup_outside_kernels(source: Scan) -> Found:
    """Find threadgroup variables in helpers, types and the program."""
    for function in source.functions:
        if not function.is_kernel:
            for declaration in _threadgroup_declarations(function.body):
                yield declaration[0].line, " ".join(texts(declaration, 0, 3))
    for statement in (*source.program, *source.members):
        if not {"using", "typedef", "template"} & set(texts(statement, 0, 1)):
            for declaration in _threadgroup_declarations(statement[:8]):
                if "(" not in [t.text for t in statement]:
                    yield declaration[0].line, " ".join(texts(declaration, 0, 3))


def threadgroup_initialisers(source: Scan) -> Found:
    """Find threadgroup variables with a value."""
    for function in source.functions:
        for declaration in _threadgroup_declarations(function.body):
            if {"=", "{"} & {t.text for t in declaration}:
                yield declaration[0].line, " ".join(texts(declaration, 0, 3))


def threadgroup_bytes(source: Scan) -> Found:
    """Find kernels with too much threadgroup memory, as far as it is known."""
    known = _numbers([s for f in source.files for s in f.program], {})
    for function in source.functions:
        sizes = _numbers(statements(function.body), known)
        total = 0
        for declaration in _threadgroup_declarations(function.body):
            total += _declared_bytes(declaration, sizes)
        if total > MAX_THREADGROUP_BYTES:
            yield function.name.line, f"{total} > {MAX_THREADGROUP_BYTES} bytes"


def statements(body: Tokens) -> list[Tokens]:
    found, begin = [], 0
    for i, token in enumerate(body):
        if token.text in (";", "{", "}"):
            found.append(body[begin:i])
            begin = i + 1
    return found


def _numbers(statements: list[Tokens], known: Mapping[str, int]) -> dict[str, int]:
    """Return integer constants: ``constexpr ... name = expression``."""
    numbers = dict(known)
    for statement in statements:
        parts = split(statement, "=")
        if len(parts) == 2 and {"constexpr", "constant"} & {t.text for t in parts[0]}:
            value = _evaluate(parts[1], numbers)
            if value is not None:
                numbers[parts[0][-1].text] = value
    return numbers


def _evaluate(tokens: Tokens, known: Mapping[str, int]) -> int | None:
    try:
        return evaluate(" ".join(t.text for t in tokens), known)
    except (ValueError, KeyError, SyntaxError, ZeroDivisionError):
        return None


def _declared_bytes(declaration: Tokens, known: Mapping[str, int]) -> int:
    """Return a declaration's bytes, or 0 if they are unknown."""
    parts = split(declaration)
    head = [t.text for t in parts[0]]
    stop = head.index("[") if "[" in head else len(head)
    found = re.fullmatch(r"(packed_)?([a-z_\d]+?)([234])?", head[stop - 2])
    if not found or found[2] not in _BYTES:
        return 0
    lanes = int(found[3] or 1)
    lanes = 4 if lanes == 3 and not found[1] else lanes
    total = 0
    for part in parts:
        count, i = 1, 0
        while i < len(part):
            if part[i].text == "[":
                end = matching(part, i)
                count *= _evaluate(part[i + 1 : end], known) or 0
                i = end
            i += 1
        total += count * lanes * _BYTES[found[2]]
    return total


def without_space(source: Scan) -> Found:
    """Find pointers and references without an address space."""
    for function in source.functions:
        for parameter in function.parameters:
            plain = [t.text for t in parameter]
            if "=" in plain:
                plain = plain[: plain.index("=")]
            starred = {"*", "&"} & set(_outside_brackets(plain))
            if starred and not SPACES & set(plain) and "auto" not in plain:
                yield parameter[0].line, " ".join(plain)
        yield from _local_pointers(function.body)


def _outside_brackets(plain: list[str]) -> list[str]:
    depth, kept = 0, []
    for text in plain:
        depth += (text in "([<") - (text in ")]>")
        if depth == 0:
            kept.append(text)
    return kept


def _local_pointers(body: Tokens) -> Found:
    for i in range(len(body) - 3):
        start = i == 0 or body[i - 1].text in (";", "{", "}")
        j = i + (body[i].text == "const")
        shape = body[j : j + 4]
        if start and len(shape) == 4 and shape[1].text in ("*", "&"):
            named = shape[0].kind == shape[2].kind == "name"
            typed = shape[0].text not in {*_NOT_TYPES, "auto"} | SPACES
            if named and typed and shape[3].text in ("=", ";"):
                yield shape[0].line, " ".join(texts(body, i, j - i + 3))


def function_pointers(source: Scan) -> Found:
    """Find ``type (*name)(`` and ``type (*)(``."""
    tokens = source.tokens
    for i, token in enumerate(tokens):
        if texts(tokens, i, 2) != ["(", "*"] or i == 0 or tokens[i - 1].kind != "name":
            continue
        closing = matching(tokens, i)
        inside = tokens[i + 2 : closing]
        if tokens[i - 1].text in {*_NOT_TYPES, "if", "while", "switch"}:
            continue
        one_name = len(inside) <= 1 and all(t.kind == "name" for t in inside)
        if one_name and texts(tokens, closing + 1, 1) == ["("]:
            yield token.line, " ".join(texts(tokens, i - 1, closing - i + 2))


def variable_arrays(source: Scan) -> Found:
    """Find local arrays whose extent is a parameter or a variable."""
    for function in source.functions:
        changing = _changing(function)
        body = function.body
        for i in range(1, len(body)):
            if body[i].text != "[" or i < 2 or body[i - 1].kind != "name":
                continue
            of_type = body[i - 2].kind == "name" and body[i - 2].text not in _NOT_TYPES
            extent = body[i + 1 : matching(body, i)]
            names = [t.text for t in extent if t.text in changing]
            if (of_type or body[i - 2].text == ">") and names:
                yield body[i].line, f"{body[i - 1].text}[{names[0]}]"


def _changing(function: Function) -> set[str]:
    """Return names of parameters and of locals that are not constants."""
    names = set()
    for parameter in function.parameters:
        plain = [t for t in split(parameter, "=")[0] if t.kind == "name"]
        before = [t.text for t in parameter]
        cut = before.index("[") if "[" in before else len(before)
        plain = [t for t in parameter[:cut] if t.kind == "name"] or plain
        if len(plain) > 1:
            names.add(plain[-1].text)
    for statement in statements(function.body):
        words = [t.text for t in statement]
        if "=" not in words or words[0] in ("constexpr", "const", "using"):
            continue
        head = statement[: words.index("=")]
        if len(head) == 2 and all(t.kind == "name" for t in head):
            names.add(head[1].text)
    return names - {t.text for t in function.template}


def _attributes(tokens: Tokens) -> Iterator[tuple[Token, Tokens]]:
    """Return each attribute's name and arguments."""
    for i in range(len(tokens) - 2):
        if texts(tokens, i, 2) != ["[", "["]:
            continue
        for part in split(tokens[i + 2 : matching(tokens, i + 1)]):
            if part[0].kind == "name":
                inner = part[2:-1] if texts(part, 1, 1) == ["("] else ()
                yield part[0], inner


def buffer_indices(source: Scan) -> Found:
    """Find ``[[buffer(n)]]`` out of range or twice in one function."""
    for function in source.functions:
        seen: Counter[str] = Counter()
        for parameter in function.parameters:
            for name, inner in _attributes(parameter):
                if name.text != "buffer" or len(inner) != 1:
                    continue
                index = inner[0].text
                seen[index] += 1
                outside = index.isdigit() and int(index) >= MAX_BUFFERS
                if outside or seen[index] == 2:
                    yield name.line, f"buffer({index})"


def too_many_buffers(source: Scan) -> Found:
    """Find kernels with more buffers than Metal binds."""
    for function in source.functions:
        plain = [{t.text for t in p} for p in function.parameters]
        n = sum(bool(p & {"device", "constant"} and p & {"*", "&"}) for p in plain)
        if function.is_kernel and n > MAX_BUFFERS:
            yield function.name.line, f"{n} > {MAX_BUFFERS}"


def vector_casts(source: Scan) -> Found:
    """Find C-style casts of values to vectors."""
    tokens = (*source.tokens, *source.macros)
    for i in range(1, len(tokens) - 3):
        if texts(tokens, i, 1) != ["("] or tokens[i + 2].text != ")":
            continue
        before, after = tokens[i - 1], tokens[i + 3]
        declares = before.kind == "name" and before.text != "return"
        value = after.kind in ("name", "number") or after.text == "("
        if _VECTOR.fullmatch(tokens[i + 1].text) and not declares and value:
            yield tokens[i].line, f"({tokens[i + 1].text})"


def _names(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


KNOWN_ATTRIBUTES = _names(
    """
    accept_any_int_args align alpha_to_coverage amplification_count amplification_id
    attribute base_instance base_vertex barycentric_coord buffer center_no_perspective
    center_perspective centroid_no_perspective centroid_perspective clip_distance color
    cull_distance data_object_in_grid depth dispatch_quadgroups_per_threadgroup
    dispatch_simdgroups_per_threadgroup dispatch_threads_per_threadgroup
    early_fragment_tests flat fragment front_facing function_constant
    grid_origin grid_size host_name id imageblock_data index_type instance instance_id
    intersection invariant kernel max_total_threadgroups_per_mesh_grid
    max_total_threads_per_threadgroup mesh object opaque_primitive origin patch
    patch_id payload point_coord point_size position position_in_patch primitive_data
    primitive_id primitive_culled quadgroup_index_in_threadgroup
    quadgroups_per_threadgroup raster_order_group ray_data render_target_array_index
    required_threads_per_threadgroup sample_id sample_mask sample_no_perspective
    sample_perspective sampler shared simdgroup_index_in_threadgroup
    simdgroups_per_threadgroup stage_in stitchable texture thread_execution_width
    thread_index_in_quadgroup thread_index_in_simdgroup thread_index_in_threadgroup
    thread_position_in_grid thread_position_in_threadgroup threadgroup
    threadgroup_position_in_grid threadgroups_per_grid threads_per_grid
    threads_per_simdgroup threads_per_threadgroup user vertex vertex_id
    viewport_array_index visible world_space_direction world_space_origin
    object_space_direction object_space_origin min_distance max_distance distance
    geometry_id geometry_intersection_function_table_offset
    instance_intersection_function_table_offset user_instance_id
    carries_dependency clang deprecated fallthrough gnu likely maybe_unused nodiscard
    noreturn unlikely unroll always_inline noinline accept_intersection
    continue_search
    """
)


def unknown_attributes(source: Scan) -> Found:
    """Find attributes that Metal lacks, with the most similar one."""
    for name, _ in _attributes(source.tokens):
        if name.text in KNOWN_ATTRIBUTES or name.text in source.macro_names:
            continue
        meant = difflib.get_close_matches(name.text, KNOWN_ATTRIBUTES, 1)
        hint = f", expected {meant[0]}?" if meant else ""
        yield name.line, name.text + hint


# Functions of C, C++ or CUDA that Metal lacks.
MISSING_FUNCTIONS = _names(
    """
    log1p expm1 cbrt hypot lgamma tgamma erf erfc remainder remquo logb scalbn nearbyint
    lrint llrint lround llround nan nexttoward fmaf fabsf expf exp2f logf log2f log10f
    sqrtf powf sinf cosf tanf tanhf fmaxf fminf floorf ceilf roundf truncf fmodf rsqrtf
    expm1f log1pf erff printf fprintf sprintf puts assert abort exit malloc calloc free
    memcpy memset memmove memcmp strlen rand srand atomicAdd atomicMax __syncthreads
    __syncwarp __shfl_sync __shfl_down_sync __shfl_xor_sync __ldg __expf
    """
)


def unknown_functions(source: Scan) -> Found:
    """Find calls of functions that neither Metal's library nor the file defines."""
    own = {f.name.text for file in source.files for f in file.functions}
    for file in source.files:
        own |= file.macro_names
    for function in source.functions:
        body = function.body
        for i, token in enumerate(body):
            if token.text not in MISSING_FUNCTIONS or token.text in own:
                continue
            member = i > 0 and body[i - 1].text in (".", "->")
            declared = i > 0 and body[i - 1].kind == "name"
            declared = declared and body[i - 1].text not in _NOT_TYPES
            if texts(body, i + 1, 1) == ["("] and not member and not declared:
                yield token.line, token.text
