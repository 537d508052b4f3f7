"""The PTX instructions that the translator (ptx.py) knows, each as one C++ statement."""

import re

TYPES = {
    f"{k}{n}": f"{c}{n}_t"
    for k, c in (("u", "uint"), ("b", "uint"), ("s", "int"))
    for n in (8, 16, 32, 64)
}
FLOATS = {"f32": "float", "f64": "double"}
TYPES |= FLOATS
REGISTERS = {"pred": "bool", **{t: f"uint{t[1:]}_t" for t in TYPES}}
SPECIAL = {
    f"%{ptx}.{d}": f"current->{name}.{d}"
    for ptx, name in (
        ("tid", "thread"),
        ("ctaid", "block"),
        ("ntid", "block_size"),
        ("nctaid", "grid_size"),
    )
    for d in "xyz"
} | {
    "%laneid": "current->lane",
    "%cluster_ctarank": "current->cluster_rank",
}
COMPARISONS = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
# Modifiers that this machine does not model (flushing, approximation) or that change nothing.
IGNORED = {
    "rn",
    "ftz",
    "approx",
    "full",
    "uni",
    "sync",
    "aligned",
    "volatile",
    "relaxed",
    "gpu",
    "nc",
    "cg",
    "ca",
    "cs",
    "L1",
    "no_allocate",
}
INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "and": "&",
    "or": "|",
    "xor": "^",
    "div": "/",
    "rem": "%",
}
FUNCTIONS = {
    "max": "max({1}, {2})",
    "min": "min({1}, {2})",
    "neg": "-({1})",
    "not": "~({1})",
    "sqrt": "std::sqrt({1})",
    "rcp": "1 / ({1})",
    "rsqrt": "1 / std::sqrt({1})",
    "ex2": "std::exp2({1})",
    "lg2": "std::log2({1})",
    "abs": "std::abs({1})",
    "copysign": "std::copysign({2}, {1})",
}
CONVERSIONS = {
    "cvt.rn.bf16.f32": ("u16", "narrow<bf16>({1}).bits", "f32"),
    "cvt.rn.f16.f32": ("u16", "narrow<f16>({1}).bits", "f32"),
    "cvt.rn.bf16x2.f32": ("u32", "pack2<bf16>({2}, {1})", "f32"),
    "cvt.rn.f16x2.f32": ("u32", "pack2<f16>({2}, {1})", "f32"),
    "cvt.rna.tf32.f32": ("u32", "to_tf32({1})", "f32"),
    "cvt.rn.tf32.f32": ("u32", "to_tf32({1})", "f32"),
    "cvt.f32.f16": ("f32", "widen(f16{{{1}}})", "u16"),
    "cvt.f32.bf16": ("f32", "widen(bf16{{{1}}})", "u16"),
}
ROUNDINGS = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}


class UnknownInstruction(NotImplementedError):
    """The translator does not know an instruction."""


def operands(text):
    """Splits at the commas outside brackets."""
    return [
        part.strip()
        for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
        if part.strip()
    ]


def elements(operand):
    return [part.strip() for part in operand.strip("{} ").split(",")]


class Instructions:
    """Methods op_<name>(opcode, its parts, operands) of the entry being translated."""

    # ---- operands

    def label(self, name):
        return "L" + re.sub(r"\W", "_", name)

    def register(self, name):
        """The C++ name and type of a register."""
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise UnknownInstruction(f"operand {name}")

    def value(self, x, type_):
        """The operand `x` as a C++ value of a PTX type."""
        if type_ == "pred":
            return f"({x} != 0)" if x in ("0", "1") or x.startswith("-") else self.register(x)[0]
        if x in SPECIAL:
            return f"static_cast<{TYPES[type_]}>({SPECIAL[x]})"
        if x == "dynamic_shared":
            return "dynamic_shared"
        if x in self.locals:
            return f"reinterpret_cast<uint64_t>({x})"
        if x in self.parameters:
            return f"reinterpret_cast<uint64_t>(p{self.parameters[x]})"
        if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", x):
            bits = f"0x{m[1]}u"
            return f"__builtin_bit_cast(float, {bits})" if type_ in FLOATS else bits
        if m := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", x):
            bits = f"uint64_t{{0x{m[1]}ull}}"
            return f"__builtin_bit_cast(double, {bits})" if type_ in FLOATS else bits
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", x):
            # INT64_MIN has no literal.
            number = int(x.rstrip("U"), 0) & (2**64 - 1)
            return f"static_cast<{TYPES[type_]}>({number}ull)"
        r, declared = self.register(x)
        if type_ in FLOATS:
            return f"__builtin_bit_cast({TYPES[type_]}, {r})"
        return r if TYPES[type_] == declared else f"static_cast<{TYPES[type_]}>({r})"

    def put(self, destination, expression, type_):
        if destination == "_":
            return f"{expression};"
        r, declared = self.register(destination)
        if type_ == "pred":
            return f"{r} = {expression};"
        x = f"static_cast<{TYPES[type_]}>({expression})"
        # Narrow integers are extended by their sign.
        return f"{r} = __builtin_bit_cast({declared}, {x});" if type_ in FLOATS else f"{r} = {x};"

    def pointer(self, operand, space):
        m = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        base, offset = m[1], f" + {m[2]}" if m[2] else ""
        if base in self.parameters:
            return f"(p{self.parameters[base]}{offset})"
        if space == "local" and base in self.locals:
            return f"({base}{offset})"
        address = base if re.fullmatch(r"\d+", base) else self.value(base, "u64")
        if space == "shared" and base.startswith("%"):
            address = self.value(base, "u32")
        return f"{'shared' if space == 'shared' else 'generic'}_pointer({address}{offset})"

    def array(self, operand, type_):
        xs = elements(operand)
        return f"{{{', '.join(self.value(x, type_) for x in xs)}}}"

    # ---- instructions

    def instruction(self, opcode, a):
        parts = [p.split("::")[0] for p in opcode.split(".")]
        op, type_ = parts[0], parts[-1]
        handler = getattr(self, f"op_{op}", None)
        if handler:
            return handler(opcode, parts, a)
        modifiers = [p for p in parts[1:-1] if p not in IGNORED]
        if type_ == "pred" and op in ("and", "or", "xor", "not"):
            terms = [self.value(x, "pred") for x in a[1:]]
            return self.put(a[0], f"!{terms[0]}" if op == "not" else INFIX[op].join(terms), "pred")
        if op == "add" and modifiers == ["rz"] and type_ == "f32":  # in log1pf
            return self.put(
                a[0], "add_to_zero({}, {})".format(*(self.value(x, type_) for x in a[1:])), type_
            )
        if type_ not in TYPES or modifiers not in ([], ["lo"]):
            raise UnknownInstruction(f"{opcode} {', '.join(a)}")
        wrapping = op in ("add", "sub", "mul", "mad", "neg") and type_[0] == "s"
        t = "u" + type_[1:] if wrapping else type_
        v = [self.value(x, t) for x in a[1:]]
        if op in INFIX:
            return self.put(a[0], f"{v[0]} {INFIX[op]} {v[1]}", t)
        if op == "mad":
            return self.put(a[0], f"{v[0]} * {v[1]} + {v[2]}", t)
        if op in FUNCTIONS:
            return self.put(a[0], FUNCTIONS[op].format("", *v), t)
        raise UnknownInstruction(f"{opcode} {', '.join(a)}")

    def op_ret(self, opcode, parts, a):
        return "return;"

    op_exit = op_ret

    def op_bra(self, opcode, parts, a):
        return f"goto {self.label(a[0])};"

    def op_mov(self, opcode, parts, a):
        t = parts[-1]
        for packed, whole in ((a[1], a[0]), (a[0], a[1])):
            if not packed.startswith("{"):
                continue
            xs = elements(packed)
            bits = int(t[1:]) // len(xs)
            part = f"u{bits}"
            if packed is a[1]:
                terms = (
                    f"static_cast<uint64_t>({self.value(x, part)}) << {i * bits}"
                    for i, x in enumerate(xs)
                )
                return self.put(whole, " | ".join(terms), f"u{t[1:]}")
            v = self.value(whole, f"u{t[1:]}")
            return " ".join(self.put(x, f"{v} >> {i * bits}", part) for i, x in enumerate(xs))
        return self.put(a[0], self.value(a[1], t), t)

    def widened(self, parts, a):
        t = parts[-1]
        wide = f"{t[0]}{int(t[1:]) * 2}"
        product = " * ".join(
            f"static_cast<{TYPES.get(wide, '__int128')}>({self.value(x, t)})" for x in a[1:3]
        )
        return product, wide

    def op_mul(self, opcode, parts, a):
        if "wide" in parts or "hi" in parts:
            product, wide = self.widened(parts, a)
            if "wide" in parts:
                return self.put(a[0], product, wide)
            return self.put(a[0], f"({product}) >> {parts[-1][1:]}", parts[-1])
        t = parts[-1].replace("s", "u")
        return self.put(a[0], f"{self.value(a[1], t)} * {self.value(a[2], t)}", t)

    def op_fma(self, opcode, parts, a):
        x, y, z = (self.value(v, parts[-1]) for v in a[1:])
        if opcode.replace(".ftz", "") == "fma.rm.f32":  # in expf
            return self.put(a[0], f"fma_down({x}, {y}, {z})", "f32")
        if parts[1] != "rn" or "sat" in parts:
            raise UnknownInstruction(opcode)
        return self.put(a[0], f"std::fma({x}, {y}, {z})", parts[-1])

    def op_mad(self, opcode, parts, a):
        if "wide" in parts:
            product, wide = self.widened(parts, a)
            return self.put(a[0], f"{product} + {self.value(a[3], wide)}", wide)
        if "lo" not in parts:
            raise UnknownInstruction(opcode)
        x, y, z = (self.value(v, f"u{parts[-1][1:]}") for v in a[1:])
        return self.put(a[0], f"{x} * {y} + {z}", f"u{parts[-1][1:]}")

    def op_shl(self, opcode, parts, a):
        name = "shift_left" if parts[0] == "shl" else "shift_right"
        return self.put(
            a[0], f"{name}({self.value(a[1], parts[-1])}, {self.value(a[2], 'u32')})", parts[-1]
        )

    op_shr = op_shl

    def bits(self, a, call, known):
        if not known:
            raise UnknownInstruction(call)
        return self.put(a[0], call.format(*(self.value(x, "u32") for x in a)), "u32")

    def op_bfi(self, opcode, parts, a):
        return self.bits(a, "bit_field_insert({1}, {2}, {3}, {4})", opcode == "bfi.b32")

    def op_bfe(self, opcode, parts, a):
        return self.bits(a, "bit_field({1}, {2}, {3})", opcode == "bfe.u32")

    def op_prmt(self, opcode, parts, a):
        return self.bits(a, "permute({1}, {2}, {3})", opcode == "prmt.b32")

    def op_shf(self, opcode, parts, a):
        left = "true" if "l" in parts else "false"
        return self.bits(a, f"funnel({{1}}, {{2}}, {{3}}, {left})", "wrap" in parts)

    def op_lop3(self, opcode, parts, a):
        return self.bits(a, "lop3({1}, {2}, {3}, {4})", opcode == "lop3.b32")

    def op_dp2a(self, opcode, parts, a):
        if parts[2:] != ["u32", "u32"]:
            raise UnknownInstruction(opcode)
        return self.bits(a, f"dot2({{1}}, {{2}}, {{3}}, {0 if parts[1] == 'lo' else 16})", True)

    def op_popc(self, opcode, parts, a):
        return self.bits(a, "__popc({1})", opcode == "popc.b32")

    def op_clz(self, opcode, parts, a):
        return self.bits(a, "__clz({1})", opcode == "clz.b32")

    def op_selp(self, opcode, parts, a):
        t = parts[-1]
        return self.put(
            a[0], f"{self.value(a[3], 'pred')} ? {self.value(a[1], t)} : {self.value(a[2], t)}", t
        )

    def op_setp(self, opcode, parts, a):
        comparison, t = parts[1], parts[-1]
        x, y = self.value(a[1], t), self.value(a[2], t)
        if len([p for p in parts[2:-1] if p not in IGNORED]) or "|" in a[0]:
            combine = {"and": "&&", "or": "||"}.get(parts[2])
            if not combine or "|" in a[0]:
                raise UnknownInstruction(opcode)
            return self.put(
                a[0],
                f"({x} {COMPARISONS[comparison]} {y}) {combine} {self.value(a[3], 'pred')}",
                "pred",
            )
        if comparison in ("nan", "num"):
            return self.put(
                a[0], f"{'' if comparison == 'nan' else '!'}({x} != {x} || {y} != {y})", "pred"
            )
        if comparison not in COMPARISONS and comparison[-1] == "u":  # unordered: true for NaN
            opposite = {"eq": "!=", "ne": "==", "lt": ">=", "le": ">", "gt": "<=", "ge": "<"}[
                comparison[:-1]
            ]
            if comparison == "neu":
                return self.put(a[0], f"{x} != {y}", "pred")
            return self.put(a[0], f"!({x} {opposite} {y})", "pred")
        if comparison == "ne" and t[0] == "f":
            return self.put(a[0], f"{x} < {y} || {x} > {y}", "pred")
        return self.put(a[0], f"{x} {COMPARISONS[comparison]} {y}", "pred")

    def op_cvt(self, opcode, parts, a):
        opcode = opcode.replace(".ftz", "")
        if opcode in CONVERSIONS:
            to, expression, from_ = CONVERSIONS[opcode]
            return self.put(a[0], expression.format("", *(self.value(x, from_) for x in a[1:])), to)
        to, from_ = parts[-2:]
        modifiers = [p for p in parts[1:-2] if p not in IGNORED]
        if opcode == "cvt.sat.f32.f32":
            return self.put(a[0], f"saturate({self.value(a[1], 'f32')})", "f32")
        if to not in TYPES or from_ not in TYPES or any(m not in ROUNDINGS for m in modifiers):
            raise UnknownInstruction(f"{opcode} {', '.join(a)}")
        v = self.value(a[1], from_)
        for m in modifiers:
            v = f"{ROUNDINGS[m]}({v})"
        return self.put(a[0], f"convert<{TYPES[to]}>({v})", to)

    def op_cvta(self, opcode, parts, a):
        v = self.value(a[1], "u64")
        if "shared" in parts:
            v = f"generic_to_shared({v})" if "to" in parts else f"shared_to_generic({v})"
        return self.put(a[0], v, "u64")

    def access(self, parts, data, address, write):
        spaces = [p for p in parts if p in ("param", "global", "shared", "local")]
        space, t = spaces[0] if spaces else "generic", parts[-1]
        xs = elements(data) if {"v2", "v4"} & set(parts) else [data]
        size = int(t[1:]) // 8
        code = [f"uint8_t* at = {self.pointer(address, space)};"]
        if space in ("global", "shared", "generic"):
            code.append(f"memory_access(at, {size * len(xs)}, {str(write).lower()}, {self.site});")
        for i, x in enumerate(xs):
            if write:
                code.append(
                    f"{TYPES[t]} v{i} = {self.value(x, t)}; memcpy(at + {i * size}, &v{i}, {size});"
                )
            else:
                code.append(
                    f"{TYPES[t]} v{i}; memcpy(&v{i}, at + {i * size}, {size}); "
                    + self.put(x, f"v{i}", t)
                )
        return " ".join(code)

    def op_ld(self, opcode, parts, a):
        return self.access(parts, a[0], a[1], False)

    def op_st(self, opcode, parts, a):
        return self.access(parts, a[1], a[0], True)

    def op_atom(self, opcode, parts, a):
        t = parts[-1]
        if "add" not in parts or t not in TYPES or t[0] == "f":
            raise UnknownInstruction(opcode)
        place = self.site.removeprefix("Site{").removesuffix("}")
        at = f"({TYPES[t]}*){self.pointer(a[1], 'global')}"
        return self.put(a[0], f"atomicAdd({at}, {self.value(a[2], t)}, {place})", t)

    def op_red(self, opcode, parts, a):
        return self.op_atom(opcode, parts, ["_", *a])

    def op_bar(self, opcode, parts, a):
        if parts[1] == "warp":
            return f"warp_barrier({self.value(a[0], 'u32')}, {self.site});"
        count = self.value(a[1], "s32") if len(a) > 1 else "0"
        id_ = self.value(a[0], "s32")
        if parts[1] != "sync":
            raise UnknownInstruction(opcode)
        return f"block_barrier({id_}, {count}, {self.site});"

    def op_barrier(self, opcode, parts, a):
        return self.op_bar(opcode, [p for p in parts if p != "cta"], a)

    def op_membar(self, opcode, parts, a):
        return ""

    op_fence = op_membar

    def op_shfl(self, opcode, parts, a):
        destination, _, predicate = a[0].partition("|")
        mode = {"up": "u", "down": "d", "bfly": "b", "idx": "i"}[parts[2]]
        arguments = ", ".join(self.value(x, "u32") for x in a[1:5])
        call = f"shuffle_ptx('{mode}', {arguments}, ok, {self.site})"
        tail = self.put(predicate, "ok", "pred") if predicate else ""
        return f"bool ok; {self.put(destination, call, 'u32')} {tail}"

    def op_ldmatrix(self, opcode, parts, a):
        xs = elements(a[0])
        if len(xs) != 4:
            raise UnknownInstruction(opcode)
        trans = str("trans" in parts).lower()
        puts = " ".join(self.put(x, f"r[{i}]", "u32") for i, x in enumerate(xs))
        row = self.pointer(a[1], "shared")
        return f"uint32_t r[4]; emulator::ldmatrix(r, {row}, {trans}, {self.site}); {puts}"

    def op_movmatrix(self, opcode, parts, a):
        return self.put(a[0], f"emulator::movmatrix({self.value(a[1], 'u32')}, {self.site})", "u32")

    def op_mma(self, opcode, parts, a):
        kinds = {
            "m16n8k16.row.col.f32.bf16.bf16.f32": "MMA_BF16",
            "m16n8k16.row.col.f32.f16.f16.f32": "MMA_F16",
            "m16n8k8.row.col.f32.tf32.tf32.f32": "MMA_TF32",
        }
        shape = opcode.partition("aligned.")[2]
        if shape not in kinds:
            raise UnknownInstruction(opcode)
        puts = " ".join(self.put(x, f"d[{i}]", "f32") for i, x in enumerate(elements(a[0])))
        return (
            f"float d[4] = {self.array(a[3], 'f32')}; uint32_t a[4] = {self.array(a[1], 'u32')}, "
            f"b[2] = {self.array(a[2], 'u32')}; "
            f"emulator::mma(d, a, b, {kinds[shape]}, {self.site}); {puts}"
        )

    def op_cp(self, opcode, parts, a):
        if opcode == "cp.async.commit_group":
            return f"emulator::cp_async_commit({self.site});"
        if opcode == "cp.async.wait_group":
            return f"emulator::cp_async_wait({a[0]}, {self.site});"
        if opcode not in ("cp.async.cg.shared.global", "cp.async.ca.shared.global"):
            raise UnknownInstruction(opcode)
        count = self.value(a[3], "s32") if len(a) > 3 else a[2]
        to, source = self.pointer(a[0], "shared"), self.pointer(a[1], "global")
        return f"emulator::cp_async({to}, {source}, {a[2]}, {count}, {self.site});"
