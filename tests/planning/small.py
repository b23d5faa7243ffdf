"""A small model of SDXL's kinds of layers, configs of it, and traces of round numbers."""

from aquatint.config.schema import Config
from aquatint.models.sdxl.model import ModelSpec, sdxl_spec
from aquatint.planning.memory import DTYPE_BYTES, GIB, Tracer
from aquatint.planning.trace import PassCost, StepCost
from aquatint.planning.trained import num_trained, weight_dtype

TERA = 10**12


def small_spec() -> ModelSpec:
    official = sdxl_spec()
    text = {"num_hidden_layers": 2, "num_attention_heads": 2}
    return ModelSpec(
        unet={
            **official.unet, "block_out_channels": [32, 64], "attention_head_dim": [1, 2], "norm_num_groups": 8, "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2], "cross_attention_dim": 40, "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 6 * 8,
        },
        vae={**official.vae, "block_out_channels": [8, 16, 24, 32], "norm_num_groups": 8},
        text_encoder={**official.text_encoder, **text, "hidden_size": 16, "intermediate_size": 32},
        text_encoder_2={**official.text_encoder_2, **text, "hidden_size": 24, "intermediate_size": 48, "projection_dim": 24},
    )  # fmt: skip


def config(**sections) -> Config:
    return Config.model_validate({"model": {"base": "/none/base.safetensors"}, "data": {"sources": [{"path": "/none"}]}, **sections})


class StubTracer(Tracer):
    """Numbers of a plausible size without a pass through the networks."""

    def step(self, config, size_hw):
        level = config.training.gradient_checkpointing
        kept = {False: 8, "pointwise": 5, True: 1}[level] * GIB * config.training.batch_size
        flops = 4 if level is True else 3
        freed = config.training.fused_backward and config.training.accumulation_steps == 1
        gradients = 0 if freed else num_trained(config, self.spec) * DTYPE_BYTES[weight_dtype(config)]
        return StepCost(kept, kept + gradients, 7 * TERA * config.training.batch_size, flops * 7 * TERA * config.training.batch_size)

    def validate(self, config, size_hw):
        return PassCost(GIB, 7 * TERA)

    def denoise(self, config):
        return PassCost(GIB, 7 * TERA)

    def decode(self, config):
        return PassCost(3 * GIB, 10 * TERA)

    def encode(self, config, size_hw):
        return PassCost(2 * GIB * config.cache.batch_size, 5 * TERA * config.cache.batch_size)
