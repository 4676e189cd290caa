"""Messages and rows of conversations that several tests share."""

USER, ASSISTANT = ({"role": role, "content": role[0]} for role in ("user", "assistant"))
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RECORDS = [{"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT, USER, ASSISTANT]}]
