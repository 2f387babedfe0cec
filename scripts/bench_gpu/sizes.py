"""What is measured at which sizes: those of Llama-3.1-8B on a GPU, tiny ones on a CPU.

The tiny sizes go through the very same code, in Triton's interpreter, so that mistakes show without
a GPU; their figures mean nothing.
"""

from dataclasses import dataclass, field

from csps.core.model_config import ModelConfig, RopeConfig, RopeScaling

LLAMA_8B = ModelConfig(
    architecture="llama",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position=131_072,
    rope=RopeConfig(
        theta=500_000.0, scaling=RopeScaling.LLAMA3, factor=8.0, original_max_position=8192
    ),
)
TINY = ModelConfig(
    architecture="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position=512,
    rope=RopeConfig(),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Token counts are multiples of `page_size`, where nothing else is said.

    `selection_page_sizes`: those that choosing pages is measured with, first the one that a claim
    is about. `clusters`: of planted patterns, whose density is one over them. `decodes`: rows of a
    step and keys of each. `model_prompts`: prompts of the model with random weights;
    `model_decodes`: its decode steps, with as many tokens of each row as there is room for.
    `prompt`, `prompt_decodes`: of the default model.
    """

    model: ModelConfig = LLAMA_8B
    page_size: int = 64
    selection_page_sizes: tuple[int, ...] = (128, 64)
    copy_bytes: int = 4 << 30
    matrix: int = 8192
    long: int = 131_072
    stage: int = 8192
    densities: tuple[float, ...] = (0.10, 0.25, 0.5, 1.0)
    clusters: tuple[int, ...] = (10, 4)
    parity_keys: int = 4096
    decodes: tuple[tuple[int, int], ...] = (
        (8, 131_072), (1, 131_072), (32, 32_768), (32, 1024), (1, 4096), (8, 300),
    )  # fmt: skip
    tokens: int = 16_384
    model_prompts: tuple[int, ...] = (32_768, 131_072)
    model_decodes: tuple[tuple[int, int], ...] = ((1, 32_768), (1, 131_072), (32, 16_384))
    prompt: int = 8000
    prompt_decodes: tuple[tuple[int, int], ...] = ((1, 8000), (32, 8000))
    decode_steps: int = 24
    profiled_steps: int = 8
    budgets_s: dict[str, float] = field(
        default_factory=lambda: {
            "machine": 15.0,
            "parity": 70.0,
            "prefill": 60.0,
            "decode": 30.0,
            "selection": 55.0,
            "llama": 120.0,
            "default_model": 50.0,
            "bandwidth": 15.0,
        }
    )


FULL = Sizes()
QUICK = Sizes(
    model=TINY,
    page_size=16,
    selection_page_sizes=(32, 16),
    copy_bytes=1 << 20,
    matrix=64,
    long=256,
    stage=128,
    densities=(0.25, 1.0),
    clusters=(4,),
    parity_keys=96,
    decodes=((3, 80), (1, 33)),
    tokens=16,
    model_prompts=(96,),
    model_decodes=((1, 64), (2, 40)),
    prompt=17,
    prompt_decodes=((1, 17),),
    decode_steps=2,
    profiled_steps=1,
)
