"""The PTX instructions of compute capability 9.0, for the translator (ptx.py)."""

import re

from ptx_instructions import Instructions, UnknownInstruction, elements

TMA_LOAD = "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
TMA_STORE = "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group"
SEND = "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"
ARRIVALS = {
    f"{name}.shared::{space}"
    for name in ("arrive", "arrive.expect_tx")
    for space in ("cta", "cluster")
}
CLUSTER_BARRIER = {
    "barrier.cluster.arrive.release": "cluster_arrive",
    "barrier.cluster.wait.acquire": "cluster_wait",
}
FENCES = {
    "fence.mbarrier_init.release.cluster": "mbarrier_init_fence();",
    "fence.proxy.async.shared::cta": "async_proxy_fence();",
}
WGMMA = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(32|64|128)k16\.f32\.(bf16\.bf16|f16\.f16)"
)


class HopperInstructions(Instructions):
    """Methods op_<name>, as in `Instructions`."""

    def cluster_pointer(self, operand):
        """An address in the shared memory of some block, ``[%r1]``."""
        return f"cluster_pointer({self.value(operand[1:-1].strip(), 'u32')})"

    def op_mbarrier(self, opcode, parts, a):
        name = opcode.removeprefix("mbarrier.").removesuffix(".b64")
        address = a[0] if parts[1] == "init" else a[1]
        remote = name.endswith("shared::cluster")
        at = self.cluster_pointer(address) if remote else self.pointer(address, "shared")
        barrier = f"(uint64_t*){at}"
        number = self.value(a[-1], "s32") if a[-1] != address else "0"
        if name == "init.shared::cta":
            return f"mbarrier_init({barrier}, {number}, {self.site});"
        if name in ARRIVALS and a[0] == "_":
            return f"mbarrier_arrive({barrier}, {number}, {self.site});"
        if name == "try_wait.parity.shared::cta":  # and never gives up here
            wait = f"mbarrier_wait({barrier}, {number}, {self.site});"
            return f"{wait} {self.put(a[0], 'true', 'pred')}"
        raise UnknownInstruction(opcode)

    def op_mapa(self, opcode, parts, a):
        if opcode != "mapa.shared::cluster.u32":
            raise UnknownInstruction(opcode)
        address, rank = self.value(a[1], "u32"), self.value(a[2], "s32")
        return self.put(a[0], f"map_shared({address}, {rank}, {self.site})", "u32")

    def op_barrier(self, opcode, parts, a):
        if opcode in CLUSTER_BARRIER:
            return f"{CLUSTER_BARRIER[opcode]}({self.site});"
        return super().op_barrier(opcode, parts, a)

    def box(self, operand):
        """The map and the coordinates of a tensor operand, ``[%rd1, {%r1, %r2, %r3, %r4}]``."""
        m = re.fullmatch(r"\[(\S+), (\{.*\})\]", operand)
        return f"(const void*){self.value(m[1], 'u64')}", f"Coordinates{self.array(m[2], 's32')}"

    def op_cp(self, opcode, parts, a):
        if opcode == TMA_LOAD:
            map_, at = self.box(a[1])
            to, barrier = self.pointer(a[0], "shared"), self.pointer(a[2], "shared")
            return f"tma_load({to}, {map_}, (uint64_t*){barrier}, {at}, {self.site});"
        if opcode == SEND:
            to, barrier = self.cluster_pointer(a[0]), self.cluster_pointer(a[3])
            bytes_ = self.value(a[2], "s32")
            return (
                f"emulator::cluster_send({to}, {self.pointer(a[1], 'shared')}, {bytes_}, "
                f"(uint64_t*){barrier}, {self.site});"
            )
        if opcode == TMA_STORE:
            map_, at = self.box(a[0])
            return f"tma_store({map_}, {self.pointer(a[1], 'shared')}, {at}, {self.site});"
        if opcode == "cp.async.bulk.commit_group":
            return "emulator::tma_store_commit();"
        if opcode == "cp.async.bulk.wait_group.read":
            return f"tma_store_wait_read({a[0]});"
        return super().op_cp(opcode, parts, a)

    def op_fence(self, opcode, parts, a):
        return FENCES[opcode] if opcode in FENCES else super().op_fence(opcode, parts, a)

    def op_setmaxnreg(self, opcode, parts, a):  # ptxas has checked it
        return ""

    def op_stmatrix(self, opcode, parts, a):
        xs = elements(a[1])
        if len(xs) != 4:
            raise UnknownInstruction(opcode)
        trans = str("trans" in parts).lower()
        row = self.pointer(a[0], "shared")
        return (
            f"uint32_t r[4] = {self.array(a[1], 'u32')}; stmatrix({row}, r, {trans}, {self.site});"
        )

    def op_wgmma(self, opcode, parts, a):
        if parts[1] == "fence":
            return f"emulator::wgmma_fence({self.site});"
        if parts[1] == "commit_group":
            return f"emulator::wgmma_commit({self.site});"
        if parts[1] == "wait_group":
            return f"emulator::wgmma_wait({a[0]}, {self.site});"
        shape = WGMMA.fullmatch(opcode)
        in_registers = a[1].startswith("{")
        signs = (["1", "1"], ["-1", "1"]) if in_registers else (["1", "1"],)
        if not shape or a[4:6] not in signs or len(a) != (7 if in_registers else 8):
            raise UnknownInstruction(f"{opcode} {', '.join(a)}")
        kind = "MMA_BF16" if shape[2] == "bf16.bf16" else "MMA_F16"
        tiles = int(shape[1]) // 8
        fragments = f"uint32_t a[4] = {self.array(a[1], 'u32')}; " if in_registers else ""
        a_tile = "0" if in_registers else self.value(a[1], "u64")
        a_columns = "0" if in_registers else a[6]
        w = (
            f"Wgmma w{{{kind}, {tiles}, {'a' if in_registers else 'nullptr'}, {a_tile}, "
            f"{self.value(a[2], 'u64')}, {a_columns} != 0, {a[-1]} != 0, "
            f"{self.value(a[3], 'pred')}, {a[4]} < 0, true}};"
        )
        sums = elements(a[0])
        puts = " ".join(self.put(x, f"d[{i}]", "f32") for i, x in enumerate(sums))
        return (
            f"{fragments}{w} float d[{len(sums)}] = {self.array(a[0], 'f32')}; "
            f"emulator::wgmma(d, w, {self.site}); {puts}"
        )
