"""The peers of tools/bench.py: transformers, TRL, Liger.

In:  a model of ours and ids. The peers use the model's tensors without a copy. Out: a function that
tools/bench.py calls and times. A peer is imported inside the function that needs it, so an ImportError names
the one that is missing.
"""

import contextlib
import sys
import tempfile

import torch


def hf_model(model):
    """The Qwen2 of transformers, which shares the tensors of `model`. It has no stop token."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**model.config.to_hf(), eos_token_id=None, bos_token_id=None)
    with model.norm.weight.device:
        twin = Qwen2ForCausalLM(config)
    weights = {name if name.startswith("lm_head") else f"model.{name}": weight.detach()
               for name, weight in model.named_parameters()}
    result = twin.load_state_dict(weights, strict=False, assign=True)
    twin.tie_weights()
    assert not result.unexpected_keys and set(result.missing_keys) <= {"lm_head.weight"}, result
    return twin.requires_grad_()


def hf_generate(model, prompts, n, max_new_tokens):
    """A function that samples n replies to each prompt with transformers. All prompts have one length."""
    twin = hf_model(model).eval()
    prompts_BT = torch.tensor(prompts, device=twin.device).repeat_interleave(n, 0)

    def run():
        twin.generate(prompts_BT, attention_mask=torch.ones_like(prompts_BT), do_sample=True, top_k=0,
                      max_new_tokens=max_new_tokens, pad_token_id=0, temperature=1.0, top_p=1.0)

    return run


def liger_loss():
    """Liger's GRPO loss with the signature of `token_logprobs`. L is a multiple of 1,024, or less than 1,024.
    It returns no log-probs: its first value is a scalar, and the second is None. The gradient of the scalar
    is that of the sum of the log-probs, as all advantages are 1 and old log-probs equal the new ones."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def function(hidden_LD, weight_VD, targets_L, temperature):
        B = max(1, len(targets_L) // 1024)
        targets_BT, hidden_BTD = targets_L.view(B, -1), hidden_LD.view(B, -1, hidden_LD.shape[1])
        loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, temperature=temperature,
                                        loss_type="bnpo")
        mean, _ = loss(hidden_BTD, weight_VD, targets_BT, torch.ones_like(targets_BT),
                       torch.ones(B, device=targets_L.device))
        return -mean * len(targets_L), None

    return function


def trl_step(model, prompts, n, max_new_tokens, precision, reward_of, at_once, clock):
    """A function that makes one step with TRL's GRPOTrainer and returns its seconds by clock(), from the
    beginning of the step to the end of the optimizer's, rollouts included; the trainer's setup, once at each
    call, does not count. at_once: replies of a micro-batch; reward_of(ids) -> number; id 0 ends a reply."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ids = {f"w{i}": i for i in range(model.config.vocab_size)}
    words = Tokenizer(models.WordLevel(ids, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")
    texts = Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in prompt) for prompt in prompts]})
    twin = hf_model(model)
    on_cpu = twin.device.type == "cpu"
    config = GRPOConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=at_once, num_generations=n, max_steps=1, beta=0.0,
        gradient_accumulation_steps=len(prompts) * n // at_once, max_completion_length=max_new_tokens,
        temperature=1.0, top_k=0, bf16=precision == "bf16", use_cpu=on_cpu, gradient_checkpointing=False,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)
    starts, seconds = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            starts.append(clock())

        def on_step_end(self, *_, **__):
            if not on_cpu:
                torch.cuda.synchronize()
            seconds.append(clock() - starts[-1])

    def rewards(completion_ids, **_):
        return [reward_of(ids) for ids in completion_ids]

    trainer = GRPOTrainer(twin, rewards, config, train_dataset=texts, processing_class=tokenizer,
                          callbacks=[Clock()])

    def run():
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
        return seconds[-1]

    return run
