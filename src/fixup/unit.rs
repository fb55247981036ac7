//! Which instructions run on the host, and the unit of the processor that executes each of them.
//! Pure data.

use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind, Register};

/// The unit of the processor that executes an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    X87,
    Mmx,
    Sse,
    Avx,
    Avx512,
}

/// Whether the host's processor has a feature other than AVX-512. Features of instructions that do
/// not run on the host are false.
// Long because it has one line for each feature.
fn is_on_host(feature: CpuidFeature) -> bool {
    use std::arch::is_x86_feature_detected as has;
    match feature {
        CpuidFeature::FPU
        | CpuidFeature::FPU287
        | CpuidFeature::FPU387
        | CpuidFeature::CMOV
        | CpuidFeature::MMX
        | CpuidFeature::SSE
        | CpuidFeature::SSE2
        | CpuidFeature::X64 => true,
        CpuidFeature::SSE3 => has!("sse3"),
        CpuidFeature::SSSE3 => has!("ssse3"),
        CpuidFeature::SSE4_1 => has!("sse4.1"),
        CpuidFeature::SSE4_2 => has!("sse4.2"),
        CpuidFeature::SSE4A => has!("sse4a"),
        CpuidFeature::AES => has!("aes"),
        CpuidFeature::PCLMULQDQ => has!("pclmulqdq"),
        CpuidFeature::SHA => has!("sha"),
        CpuidFeature::GFNI => has!("gfni"),
        CpuidFeature::VAES => has!("vaes"),
        CpuidFeature::VPCLMULQDQ => has!("vpclmulqdq"),
        CpuidFeature::AVX => has!("avx"),
        CpuidFeature::AVX2 => has!("avx2"),
        CpuidFeature::FMA => has!("fma"),
        CpuidFeature::F16C => has!("f16c"),
        CpuidFeature::AVX_VNNI => has!("avxvnni"),
        CpuidFeature::AVX_IFMA => has!("avxifma"),
        CpuidFeature::AVX_NE_CONVERT => has!("avxneconvert"),
        CpuidFeature::AVX_VNNI_INT8 => has!("avxvnniint8"),
        _ => false,
    }
}

/// Whether the host's processor has a feature of AVX-512. None for other features.
fn avx512_on_host(feature: CpuidFeature) -> Option<bool> {
    use std::arch::is_x86_feature_detected as has;
    Some(match feature {
        CpuidFeature::AVX512F => has!("avx512f"),
        CpuidFeature::AVX512CD => has!("avx512cd"),
        CpuidFeature::AVX512BW => has!("avx512bw"),
        CpuidFeature::AVX512DQ => has!("avx512dq"),
        CpuidFeature::AVX512VL => has!("avx512vl"),
        CpuidFeature::AVX512_IFMA => has!("avx512ifma"),
        CpuidFeature::AVX512_VBMI => has!("avx512vbmi"),
        CpuidFeature::AVX512_VBMI2 => has!("avx512vbmi2"),
        CpuidFeature::AVX512_VNNI => has!("avx512vnni"),
        CpuidFeature::AVX512_BITALG => has!("avx512bitalg"),
        CpuidFeature::AVX512_VPOPCNTDQ => has!("avx512vpopcntdq"),
        CpuidFeature::AVX512_BF16 => has!("avx512bf16"),
        CpuidFeature::AVX512_VP2INTERSECT => has!("avx512vp2intersect"),
        CpuidFeature::AVX512_FP16 => has!("avx512fp16"),
        _ => return None,
    })
}

/// Whether an instruction converts to a general register: the instructions of SSE that have no
/// vector register if their source is in memory.
fn is_conversion(i: &Instruction) -> bool {
    use Mnemonic::{Cvtsd2si, Cvtss2si, Cvttsd2si, Cvttss2si};
    matches!(i.mnemonic(), Cvtsd2si | Cvtss2si | Cvttsd2si | Cvttss2si)
}

/// The unit of an instruction that can run on the host. None for all other instructions.
pub(super) fn unit(i: &Instruction) -> Option<Unit> {
    let is_other = matches!(
        i.mnemonic(),
        // They have fix-ups of their own: they could fault on the host.
        Mnemonic::Wait | Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr
    );
    let features = i.cpuid_features();
    let is_here =
        |feature: &CpuidFeature| avx512_on_host(*feature).unwrap_or_else(|| is_on_host(*feature));
    if is_other || features.is_empty() || !features.iter().all(is_here) {
        return None;
    }
    let is_register = |register: &dyn Fn(Register) -> bool| {
        (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && register(i.op_register(n)))
    };
    let is_x87 = features.iter().any(|feature| {
        matches!(feature, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387)
    });
    let is_avx512 = features.iter().any(|feature| avx512_on_host(*feature).is_some());
    Some(match i.encoding() {
        EncodingKind::Legacy if is_x87 => Unit::X87,
        EncodingKind::Legacy if i.mnemonic() == Mnemonic::Emms => Unit::Mmx,
        EncodingKind::Legacy if is_register(&Register::is_mm) => Unit::Mmx,
        EncodingKind::Legacy if is_register(&Register::is_xmm) || is_conversion(i) => Unit::Sse,
        // VZEROALL and VZEROUPPER have no vector operand.
        EncodingKind::VEX if is_avx512 => Unit::Avx512,
        EncodingKind::VEX => Unit::Avx,
        EncodingKind::EVEX => Unit::Avx512,
        _ => return None,
    })
}

/// Whether an instruction is one of those that run on the host.
pub(crate) fn is_vector(i: &Instruction) -> bool {
    unit(i).is_some()
}
