"""Plants known faults in a copy of the code, one at a time, and sees the tests catch each one: `make mutants`.

Most are mistakes that other GRPO code has made. Every one is a piece of text that stands exactly once in its
file; change it here together with the code. Prints a line a fault with the test that caught it; exits with
status 1 where a fault survives, and 2 where the tests fail without one.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Where the faults of a file must show.
TESTS = {"grpo.py": "tests/test_grpo.py", "model.py": "tests/test_grpo.py", "train.py": "tests/test_train.py"}
# It compares this list with the code, so it would catch any fault.
NOT_COUNTED = "tests/test_grpo.py::test_every_planted_fault_fits_the_code"

# (file, text, text with the fault, what goes wrong)
MUTANTS = [
    ("grpo.py", "rewards_PG.std(1, keepdim=True)", "rewards_PG.std(1, keepdim=True, correction=0)",
     "the biased standard deviation"),
    ("grpo.py", "return torch.where(spread_P[:, None], adv_PG, 0.0)", "return adv_PG",
     "rounding of equal rewards, and NaN, become advantages"),
    ("grpo.py", " & rewards_PG.isfinite().all(1)", "",
     "a NaN reward poisons its group"),
    ("grpo.py", "rewards_PG.shape[1] < 2", "rewards_PG.shape[1] < 1",
     "a group of one is accepted"),
    ("grpo.py", "[last_of_prompt, *range(len(tokens), len(tokens) + len(reply) - 1)]",
     "range(len(tokens) - 1, len(tokens) + len(reply) - 1)",
     "the reply before predicts a reply's first token: a shift by one"),
    ("grpo.py", "range(len(prompt), len(prompt) + len(reply))",
     "range(len(tokens) - len(reply), len(tokens))",
     "positions go on from the reply before"),
    ("grpo.py", "                packs.append(pack(prompts, replies, first))\n",
     "                packs.append(pack(prompts, replies))\n",
     "replies are counted anew in each micro-batch: advantages of others"),
    ("grpo.py", "        return logp_CV.gather(1, targets_C[:, None])[:, 0], entropy_C\n",
     "        logp_C = logp_CV.gather(1, targets_C[:, None])[:, 0]\n"
     "        return logp_C.where(targets_C != targets_C.max(), logp_C.detach()), entropy_C\n",
     "the stop token, masked by its id, gets no gradient"),
    ("grpo.py", "torch.float32)) / temperature", "torch.float32))",
     "the temperature is forgotten"),
    ("grpo.py", "weight_VD = weight_VD[:vocab_size]", "weight_VD = weight_VD[:]",
     "rows without a token take part in the softmax"),
    ("grpo.py", "checkpoint(chunk_logprobs, hidden_CD, weight_VD, targets_C, use_reentrant=False)",
     "chunk_logprobs(hidden_CD, weight_VD, targets_C)",
     "the logits of all chunks wait for backward"),
    ("grpo.py", "F.log_softmax(logits_CV, -1)", "logits_CV - logits_CV.exp().sum(-1, keepdim=True).log()",
     "the softmax overflows"),
    ("grpo.py", "old_logp_L = old_logp_L.detach()", "old_logp_L = logp_L.detach()",
     "the ratio is always 1 and never clips"),
    ("grpo.py", "torch.minimum(plain_L, clipped_L)", "clipped_L",
     "the clip is no lower bound: mistakes are not undone"),
    ("grpo.py", "ratio_L.clamp(1 - clip_low, 1 + clip_high)", "ratio_L.clamp(1 - clip_low, 1 + clip_low)",
     "one clip for both sides"),
    ("grpo.py", "log_ratio_L.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()", "log_ratio_L.exp()",
     "the ratio overflows"),
    ("grpo.py", "torch.expm1(d_L) - d_L", "d_L.exp() - 1 - d_L",
     "k3 loses its digits near zero"),
    ("grpo.py", "(ref_logp_L.detach() - logp_L)", "(logp_L - ref_logp_L.detach())",
     "the KL of the reference from the policy"),
    ("grpo.py", "loss = loss_L.sum() / denominator", "loss = loss_L.mean()",
     "the mean of each micro-batch: the loss depends on the split"),
    ("grpo.py", "torch.stack([part[name] for part in parts])", "parts[-1][name]",
     "the logged statistics are the last micro-batch's"),
    ("model.py", "device=q.device).tril(P)", "device=q.device)",
     "a token sees those that follow it in its reply"),
    ("train.py", "for i in range(prompts.start * n, prompts.stop * n)",
     "for p in live_P for i in range(p * n, p * n + n)",
     "groups without spread leave the denominator"),
    ("train.py", "part.old_logp_L, _ = logprobs_of_pack(model, part.pack, **passes)",
     "part.old_logp_L, _ = logprobs_of_pack(model, part.pack, **{**passes, 'temperature': 1.0})",
     "the old log-probs lack the temperature"),
    ("train.py", "part.ref_logp_L, _ = logprobs_of_pack(reference, part.pack, **passes)",
     "part.ref_logp_L, _ = logprobs_of_pack(reference, part.pack, **{**passes, 'temperature': 1.0})",
     "the reference's log-probs lack the temperature"),
    ("train.py", "adv_N = adv_PG[live_P].flatten()", "adv_N = adv_PG[live_P].T.flatten()",
     "advantages are scrambled against rollouts"),
    ("train.py", "    if not skipped:\n        optimizer.step()\n", "    optimizer.step()\n",
     "a gradient that is not finite is applied"),
]


def run_tests(files, file=None, old=None, new=None):
    """(status of pytest, the first test that failed) on a fresh copy of the code, with a fault where given."""
    with tempfile.TemporaryDirectory(prefix="mutant_") as folder:
        copy = Path(folder)
        for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
            shutil.copy(path, copy)
        for name in ("configs", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        if file:
            text = (copy / file).read_text(encoding="utf-8")
            if text.count(old) != 1:
                sys.exit(f"error: {file} holds {old!r} {text.count(old)} times, not once: correct MUTANTS")
            (copy / file).write_text(text.replace(old, new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no",
                   "--deselect", NOT_COUNTED, *files]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        failed = re.search(r"^FAILED \S+::(\S+)", done.stdout, re.MULTILINE)
        return done.returncode, failed.group(1) if failed else done.stdout + done.stderr


def main():
    began = time.perf_counter()
    status, output = run_tests(sorted(set(TESTS.values())))
    if status:
        print(f"error: the tests fail without a planted fault; first make them pass: {output}")
        sys.exit(2)
    survived = 0
    for file, old, new, what in MUTANTS:
        status, output = run_tests([TESTS[file]], file, old, new)
        # 1 is pytest's "some test failed". Anything else above 0 is a fault that breaks the tests themselves.
        if status == 1:
            print(f"caught    {file:9} {what}  [{output}]", flush=True)
        else:
            survived += 1
            print(f"SURVIVED  {file:9} {what}" + (f"\n{output}" if status else ""), flush=True)
    print(f"{len(MUTANTS) - survived} of {len(MUTANTS)} planted faults caught "
          f"in {time.perf_counter() - began:.0f} s")
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
