"""`launch.py generate`: one answer, streamed to the terminal, thoughts dimmed."""

from __future__ import annotations

import random

from configs.schema import ConfigError
from data import tokenizer as tok
from data.render import KimiRenderer
from data.tasks import check, make_problem
from model.generate import Stats, stream
from model.served_params import SERVED
from train.console import console
from train.weights import load_weights


def generate(source: str, text: str, *, raw: bool, max_new_tokens: int, temperature: float, top_p: float, min_p: float,
             seed: int, task: str) -> int:
    """Print the reply to `text` (or, without one, to a held-out problem of a built-in task) and what it cost."""
    weights = load_weights(source)
    tokenizer, problem = weights.tokenizer, None
    if raw:
        if not text:
            raise ConfigError("--raw continues a text: give one as the prompt")
        prompt = [tokenizer.bos_id, *tokenizer.encode(text)]
    else:
        if not text:
            problem = make_problem(task, seed=0, index=random.randrange(1 << 30), length=5)
            text = problem.question[-1]["content"]
        prompt = KimiRenderer(tokenizer).prompt([{"role": "user", "content": text}])
    console.print(f"[bold]{text}[/]" if raw else f"[bold]user[/]  {text}", end="" if raw else "\n", markup=True)
    stats, ids, thinking = Stats(), [], 0
    special = {i: name for name, i in tokenizer.special.items()}
    shown, inside = "", False
    for token in stream(weights.model, weights.params, prompt, max_new_tokens=max_new_tokens,
                        stop_ids=tokenizer.stop_ids, serving=SERVED, amount=0.0, dtype=weights.dtype,
                        platform=weights.platform, temperature=temperature, top_p=top_p, min_p=min_p, seed=seed,
                        stats=stats):
        ids.append(token)
        name = special.get(token)
        inside = (inside or name == tok.THINK) and name != tok.THINK_END
        thinking += inside
        if name == tok.THINK:
            console.print("[dim]thoughts[/]", markup=True)
        elif name == tok.THINK_END:
            console.print("\n[bold]answer[/]  ", end="", markup=True)
        elif name is None:
            # Bytes of a character that is not complete yet wait for the rest.
            whole = tokenizer.decode([i for i in ids if i not in special])
            if not whole.endswith("\ufffd"):
                console.print(whole[len(shown):], end="", style="dim" if inside else None, markup=False)
                shown = whole
    console.print()
    if problem:
        right = check(problem, tokenizer.decode(ids))
        console.print(f"[{'green' if right else 'red'}]{'right' if right else 'wrong'}[/]: the answer is {problem.answer}",
                      markup=True)
    console.print(f"[dim]{stats.prompt_tokens} prompt tokens, {len(ids)} new ({thinking} of them thought), first after "
                  f"{stats.first_token_s:.2f} s, then {stats.tokens_per_s:.1f} tokens/s[/]", markup=True)
    return 0
