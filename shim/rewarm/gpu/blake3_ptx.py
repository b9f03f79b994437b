"""BLAKE3 for the GPU, as PTX text which the driver compiles: the digest of each of many windows of device memory.

So what is verified is what has arrived, and no processor has to hash 40 GB/s. One block of THREADS threads takes one
window (WINDOW bytes, 2048 of BLAKE3's chunks of 1 KiB) in 43 compressions: in each of the first 32 a thread takes 64
bytes of its two chunks, one chunk after the other; then it has the parent of those two; then half of the threads have
the parents of two neighbours each, then a quarter, until the first thread has the root.

All branches are the same for all threads of a block. Source: the BLAKE3 specification, sections 2.2 to 2.5; PTX ISA.
"""

from __future__ import annotations

from collections.abc import Iterator

THREADS = 1024
"""Of a block."""
NAME = "digests"
"""The kernel: `digests(addresses, found)`, one block for each window. `addresses` are the windows' (8 bytes each,
little endian), `found` takes their digests (32 bytes each, aligned to 16); both are where the GPU can reach them."""

_LEAVES, _PAIR, _ROOT = 32, 32, 42
_INITIAL = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
_PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
_ROUNDS = 7
_CHUNK_START, _CHUNK_END, _PARENT, _ROOT_FLAG = 1, 2, 4, 8
_COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
_DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))

# %m: the block of message. %h: the chaining value. %v: the state of the compression. %k: the value of the thread's
# first chunk. %w: address of its chunks. %step: the compression. %t: its number in the block.
_TEXT = """
.version 6.3
.target {target}
.address_size 64
.visible .entry {name}(.param .u64 addresses, .param .u64 found)
.maxntid {threads}, 1, 1
{{
.reg .b32 %v<16>, %m<16>, %h<8>, %k<8>, %t, %step, %block, %flags, %leaf, %a, %s, %active;
.reg .b64 %w, %l, %f;
.reg .pred %p, %q;
.shared .align 16 .b8 tree[{tree}];

mov.u32 %t, %tid.x;
mov.u32 %a, %ctaid.x;
ld.param.u64 %w, [addresses];
mul.wide.u32 %l, %a, 8;
add.u64 %w, %w, %l;
ld.global.u64 %w, [%w];
mul.wide.u32 %l, %t, 2048;
add.u64 %w, %w, %l;
ld.param.u64 %f, [found];
mul.wide.u32 %l, %a, 32;
add.u64 %f, %f, %l;
mov.u32 %step, 0;

NEXT:
setp.ge.u32 %p, %step, {leaves};
@%p bra PARENT;
shr.u32 %leaf, %step, 4;
and.b32 %block, %step, 15;
mul.wide.u32 %l, %step, 64;
add.u64 %l, %w, %l;
{load_block}
add.u32 %a, %t, %t;
add.u32 %leaf, %a, %leaf;
mov.u32 %flags, 0;
setp.eq.u32 %p, %block, 15;
@%p mov.u32 %flags, {chunk_end};
setp.ne.u32 %p, %block, 0;
@%p bra COMPRESS;
mov.u32 %flags, {chunk_start};
{initial}
bra COMPRESS;

PARENT:
mov.u32 %leaf, 0;
mov.u32 %flags, {parent};
setp.ne.u32 %p, %step, {pair};
@%p bra TREE;
{pair_block}
{initial}
mov.u32 %active, {threads};
bra COMPRESS;
TREE:
shr.u32 %active, %active, 1;
setp.lt.u32 %q, %t, %active;
mul.lo.u32 %a, %t, 64;
mov.u32 %s, tree;
add.u32 %a, %a, %s;
bar.sync 0;
{tree_block}
bar.sync 0;
{initial}
setp.eq.u32 %p, %step, {root};
@%p mov.u32 %flags, {parent_root};

COMPRESS:
{state}
mov.u32 %v12, %leaf;
mov.u32 %v13, 0;
mov.u32 %v14, 64;
mov.u32 %v15, %flags;
{rounds}
{chain}

setp.eq.u32 %p, %step, 15;
@!%p bra KEEP;
{keep}
KEEP:
setp.lt.u32 %p, %step, {pair};
@%p bra DONE;
setp.eq.u32 %p, %step, {root};
@%p bra LAST;
setp.lt.u32 %q, %t, %active;
mul.lo.u32 %a, %t, 32;
mov.u32 %s, tree;
add.u32 %a, %a, %s;
{store}
DONE:
add.u32 %step, %step, 1;
bra NEXT;

LAST:
setp.eq.u32 %q, %t, 0;
{result}
ret;
}}
"""


def text(capability: tuple[int, int] = (9, 0)) -> str:
    """The module, for the driver's compiler and a GPU of this compute capability."""
    return _TEXT.format(
        # The oldest that CUDA 13 knows, where that is old enough.
        target="sm_75" if capability >= (7, 5) else "sm_50",
        name=NAME,
        threads=THREADS,
        tree=THREADS * 32,
        leaves=_LEAVES,
        pair=_PAIR,
        root=_ROOT,
        chunk_start=_CHUNK_START,
        chunk_end=_CHUNK_END,
        parent=_PARENT,
        parent_root=_PARENT | _ROOT_FLAG,
        load_block=_vectors("ld.global.v4.u32 {{{registers}}}, [%l+{at}];", "m", 16),
        tree_block=_vectors("@%q ld.shared.v4.u32 {{{registers}}}, [%a+{at}];", "m", 16),
        store=_vectors("@%q st.shared.v4.u32 [%a+{at}], {{{registers}}};", "h", 8),
        result=_vectors("@%q st.global.v4.u32 [%f+{at}], {{{registers}}};", "h", 8),
        pair_block=_moves("m", [f"%k{at}" for at in range(8)] + [f"%h{at}" for at in range(8)]),
        initial=_moves("h", [f"{word:#x}" for word in _INITIAL]),
        state=_moves("v", [f"%h{at}" for at in range(8)] + [f"{word:#x}" for word in _INITIAL[:4]]),
        keep=_moves("k", [f"%h{at}" for at in range(8)]),
        rounds="\n".join(_rounds()),
        chain="\n".join(f"xor.b32 %h{at}, %v{at}, %v{at + 8};" for at in range(8)),
    )


def _vectors(form: str, letter: str, count: int) -> str:
    lines = []
    for at in range(0, count, 4):
        registers = ", ".join(f"%{letter}{number}" for number in range(at, at + 4))
        lines.append(form.format(registers=registers, at=at * 4))
    return "\n".join(lines)


def _moves(letter: str, values: list[str]) -> str:
    return "\n".join(f"mov.u32 %{letter}{at}, {value};" for at, value in enumerate(values))


def _rounds() -> Iterator[str]:
    order = list(range(16))
    for _ in range(_ROUNDS):
        for number, quarter in enumerate((*_COLUMNS, *_DIAGONALS)):
            yield from _mix(*quarter, order[2 * number], order[2 * number + 1])
        order = [order[at] for at in _PERMUTATION]


def _mix(a: int, b: int, c: int, d: int, first: int, second: int) -> Iterator[str]:
    for word, high, low in ((first, 16, 12), (second, 8, 7)):
        yield f"add.u32 %v{a}, %v{a}, %v{b};"
        yield f"add.u32 %v{a}, %v{a}, %m{word};"
        yield f"xor.b32 %v{d}, %v{d}, %v{a};"
        yield f"shf.r.wrap.b32 %v{d}, %v{d}, %v{d}, {high};"
        yield f"add.u32 %v{c}, %v{c}, %v{d};"
        yield f"xor.b32 %v{b}, %v{b}, %v{c};"
        yield f"shf.r.wrap.b32 %v{b}, %v{b}, %v{b}, {low};"
