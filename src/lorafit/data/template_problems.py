"""What can be wrong with one row once a template has rendered it: short names, which data/ turns into findings."""

from __future__ import annotations

STOP_MISSING = "stop-missing"
"""A supervised answer is not followed by a token that ends the turn: the model would not learn to stop."""

BOS_DOUBLED = "bos-doubled"
"""The row starts with BOS twice: serving sends it once."""

REFUSED = "refused"
"""The chat template raised an error on this row; `Encoded.detail` holds its words, and there are no ids."""

NOT_PREFIX_STABLE = "not-prefix-stable"
"""The template renders earlier answers differently once the conversation goes on: only the last one is supervised."""

PROMPT_DIFFERS = "prompt-differs"
"""The prompt that serving would send is not how the training text begins."""

CONTENT_CHANGED = "content-changed"
"""The template dropped or rewrote (part of) an answer; white space around it does not count."""

STRADDLED = "straddled"
"""A token covers the prompt's end and the answer's start: it is not supervised, and serving splits it otherwise."""

PROMPT_SPLIT = "prompt-split"
"""The tokenizer splits this template's prompt otherwise when an answer follows: true of every row."""

TOOLS_IGNORED = "tools-ignored"
"""The row has tools or tool calls, and the template does not read them."""

TOO_LARGE = "too-large"
"""The row holds more text than is ever rendered (`MAX_ROW_CHARACTERS`); there are no ids."""

NOT_TEXT = "not-text"
"""The row holds half a surrogate pair, which no tokenizer takes; there are no ids."""

ALL_PROBLEMS = (
    STOP_MISSING,
    BOS_DOUBLED,
    REFUSED,
    NOT_PREFIX_STABLE,
    PROMPT_DIFFERS,
    CONTENT_CHANGED,
    STRADDLED,
    PROMPT_SPLIT,
    TOOLS_IGNORED,
    TOO_LARGE,
    NOT_TEXT,
)
