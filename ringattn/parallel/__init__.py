"""Training on several axes of parallelism at once: context parallelism inside torch's own engine, one file per axis."""

from ringattn.parallel.checkpoint import TrainingProgress, latest_checkpoint, load_checkpoint, save_checkpoint
from ringattn.parallel.context_parallel import local_batch, make_cp_attention
from ringattn.parallel.data_parallel import apply_fsdp, apply_fsdp_to_layers, no_sync
from ringattn.parallel.decoder import Decoder, DecoderConfig, MoESpec
from ringattn.parallel.expert_parallel import apply_ep
from ringattn.parallel.grad_norm import clip_gradients, gradient_norm
from ringattn.parallel.mesh import (
    axis_mesh,
    axis_size,
    build_mesh,
    context_mesh,
    data_parallel_rank,
    describe_mesh,
    expert_fsdp_mesh,
    expert_mesh,
    fsdp_mesh,
    loss_mesh,
)
from ringattn.parallel.moe import MixtureOfExperts, make_moe
from ringattn.parallel.parallelize_decoder import parallelize
from ringattn.parallel.parallelize_hf_model import parallelize_hf
from ringattn.parallel.pipeline import MicroBatch, Pipeline, cut_stages
from ringattn.parallel.pipeline_profile import (
    PipelineOp,
    TimedOp,
    bubble_formula,
    bubble_fraction,
    simulate_timeline,
    simulated_bubble,
)
from ringattn.parallel.pipeline_schedule import PipelineSchedule, plan_pipeline
from ringattn.parallel.tensor_parallel import apply_tp
from ringattn.parallel.vocab_parallel_loss import all_reduce_loss, count_valid, cross_entropy

__all__ = [
    "Decoder",
    "DecoderConfig",
    "MicroBatch",
    "MixtureOfExperts",
    "MoESpec",
    "Pipeline",
    "PipelineOp",
    "PipelineSchedule",
    "TimedOp",
    "TrainingProgress",
    "all_reduce_loss",
    "apply_ep",
    "apply_fsdp",
    "apply_fsdp_to_layers",
    "apply_tp",
    "axis_mesh",
    "axis_size",
    "bubble_formula",
    "bubble_fraction",
    "build_mesh",
    "clip_gradients",
    "context_mesh",
    "count_valid",
    "cross_entropy",
    "cut_stages",
    "data_parallel_rank",
    "describe_mesh",
    "expert_fsdp_mesh",
    "expert_mesh",
    "fsdp_mesh",
    "gradient_norm",
    "latest_checkpoint",
    "load_checkpoint",
    "local_batch",
    "loss_mesh",
    "make_cp_attention",
    "make_moe",
    "no_sync",
    "parallelize",
    "parallelize_hf",
    "plan_pipeline",
    "save_checkpoint",
    "simulate_timeline",
    "simulated_bubble",
]
