"""The peers of tools/bench.py, ready to be timed: transformers, TRL, Liger.

In:  a model of ours, whose tensors they take as they are, and ids. Out: a function to be called. A peer is
imported only where it is used, so that an ImportError tells which one is missing.
"""

import contextlib
import sys
import tempfile

import torch


def hf_model(model):
    """The Qwen2 of transformers with the tensors of `model` as its own; no token ends its replies."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**model.config.to_hf(), eos_token_id=None, bos_token_id=None)
    with model.norm.weight.device:
        twin = Qwen2ForCausalLM(config)
    weights = {name if name.startswith("lm_head") else f"model.{name}": weight.detach()
               for name, weight in model.named_parameters()}
    told = twin.load_state_dict(weights, strict=False, assign=True)
    twin.tie_weights()
    assert not told.unexpected_keys and set(told.missing_keys) <= {"lm_head.weight"}, told
    return twin.requires_grad_()


def hf_generate(model, prompts, n, max_new_tokens):
    """Sampling of n replies to each prompt, all prompts of one length, by transformers."""
    twin = hf_model(model).eval()
    prompts_BT = torch.tensor(prompts, device=twin.device).repeat_interleave(n, 0)

    def run():
        twin.generate(prompts_BT, attention_mask=torch.ones_like(prompts_BT), do_sample=True, top_k=0,
                      max_new_tokens=max_new_tokens, pad_token_id=0, temperature=1.0, top_p=1.0)

    return run


def liger_loss():
    """Liger's GRPO loss under the signature of `token_logprobs`, N a multiple of 1,024 or less than that.

    It gives no log-probs. Its first value, times one, has the gradient of their sum: advantages are 1, old
    log-probs its own.
    """
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
    """One step of TRL's GRPOTrainer, `at_once` replies a micro-batch; returns its seconds by clock().

    Counted from the step's beginning, rollouts included, to the end of the optimizer's step; not what the
    trainer sets up before, once for each run. reward_of(ids) -> number; id 0 ends a reply.
    """
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
    began, seconds = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            began.append(clock())

        def on_step_end(self, *_, **__):
            if not on_cpu:
                torch.cuda.synchronize()
            seconds.append(clock() - began[-1])

    def rewards(completion_ids, **_):
        return [reward_of(ids) for ids in completion_ids]

    trainer = GRPOTrainer(twin, rewards, config, train_dataset=texts, processing_class=tokenizer,
                          callbacks=[Clock()])

    def run():
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
        return seconds[-1]

    return run
