"""Fine-tune a small model on real text with Trainer, and generate from it; all ranks share each sequence."""

import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import ringattn.hf as rhf

CONTEXT, STEPS, RANKS = 512, 30, 2

# A random model whose tokens are bytes; nothing is downloaded. Yours is LlamaForCausalLM.from_pretrained(...).
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))

# The text is Python's own source.
source = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_bytes()
rows = torch.frombuffer(bytearray(source[: CONTEXT * STEPS]), dtype=torch.uint8).long().view(STEPS, CONTEXT)
dataset = [{"input_ids": row, "labels": row} for row in rows]


class MyTrainer(rhf.RingTrainer):
    """A Trainer that also saves memory around attention. RingTrainer alone is enough otherwise."""

    def patched(self, model: nn.Module, mesh: DeviceMesh) -> rhf.Handle:
        """Returns the handle of the model, patched for the ranks of `mesh`."""
        return rhf.patch(model, mesh, layout="zigzag", tile_mlp=4, chunk_loss=128)


arguments = TrainingArguments(
    output_dir="results/finetuned",
    parallelism_config=ParallelismConfig(cp_size=RANKS),  # number of ranks that share each sequence
    per_device_train_batch_size=1,
    max_steps=STEPS,
    learning_rate=3e-3,
    logging_steps=5,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
    ddp_find_unused_parameters=False,
    use_cpu=not torch.cuda.is_available(),
)
trainer = MyTrainer(model=model, args=arguments, train_dataset=dataset)
trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert losses[-1] < 0.8 * losses[0]

# Generate after a prompt; keys and values are distributed over the ranks.
prompt = rows[:1, :300].to(model.device)
model.eval()
with rhf.patch(model) as handle, torch.no_grad():
    cache = rhf.RingCache(handle, num_pages=64)
    generated = model.generate(prompt, past_key_values=cache, max_new_tokens=40, do_sample=False, pad_token_id=0)

# One process generates the same.
assert torch.equal(generated, model.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0))
if dist.get_rank() == 0:
    print(bytes(generated[0, 300:].tolist()))
dist.destroy_process_group()
