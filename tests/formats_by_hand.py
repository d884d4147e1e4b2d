"""A row or more of each format of preference data, written by hand, and the pairs that must come of them."""
import itertools

from mindrlhf.data.dialogue import Message


def user(text):
    return Message("user", text)


def bot(text):
    return Message("assistant", text)


def said(role, content):
    return {"role": role, "content": content}


def hh(*turns):
    return "".join(f"\n\n{name}: {text}" for name, text in zip(itertools.cycle(("Human", "Assistant")), turns))


Q, DIALOGUE = (user("q"),), (user("q1"), bot("a1"), user("q2"))
MESSAGES = [said("user", "q1"), said("assistant", "a1"), said("user", "q2")]
A, B = (bot("a"),), (bot("b"),)
ONE = (Q, A, B)


def several(prompt, texts, pairs, margin=None, prompt_id=0):
    return [(prompt, (bot(texts[better]),), (bot(texts[worse]),), margin, prompt_id, better, worse)
            for better, worse in pairs]


# format -> [(row, what comes of it)]: pairs as (prompt, chosen, rejected, ...), or (reason, pairs) of what is skipped
FIXTURES = {
    "cvalues": [
        ({"prompt": "q", "pos_resp": "a", "neg_resp": "b", "pos_type": "拒绝为主", "neg_type": "风险回复"}, [ONE]),
        ({"prompt": "q", "pos_resp": "a", "neg_resp": "b", "system": "s", "margin": 2},
         [((Message("system", "s"), *Q), A, B, 2.0)]),
        ({"prompt": "q", "pos_resp": "a", "neg_resp": "b", "system": None, "margin": None}, [ONE])],
    "explicit": [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, [ONE]),
        ({"prompt": "q", "chosen": "a", "rejected": "", "margin": 0.5}, [(Q, A, (bot(""),), 0.5)])],
    "implicit": [
        ({"chosen": hh("q", "a"), "rejected": hh("q", "b")}, [ONE]),
        ({"chosen": hh("q1", "a1", "q2", "a"), "rejected": hh("q1", "a1", "q2", "b")}, [(DIALOGUE, A, B)]),
        # they part at the user's second question, so the answers begin before it
        ({"chosen": hh("q", "a", "x", "y"), "rejected": hh("q", "a", "z", "")},
         [(Q, (bot("a"), user("x"), bot("y")), (bot("a"), user("z"), bot("")))]),
        ({"chosen": "Human: q\n\nAssistant: a", "rejected": " \n\nHuman:q\n\nAssistant:b\n"}, [ONE]),
        ({"chosen": hh("q", "say Human: a"), "rejected": hh("q", "b\n\nnot Human: b")},
         [(Q, (bot("say Human: a"),), (bot("b\n\nnot Human: b"),))]),
        ({"chosen": hh("q", "a"), "rejected": hh("q", "a")}, [(Q, A, A)])],
    "messages-explicit": [
        ({"prompt": MESSAGES, "chosen": [said("assistant", "a")], "rejected": [said("assistant", "b")]},
         [(DIALOGUE, A, B)]),
        ({"prompt": [said("system", "s"), said("user", "q")],
          "chosen": [said("assistant", "a"), said("tool", "t"), said("assistant", "c")],
          "rejected": [said("assistant", "b")]},
         [((Message("system", "s"), *Q), (bot("a"), Message("observation", "t"), bot("c")), B)]),
        ({"prompt": [said("user", "q")], "chosen": [said("user", "q"), said("assistant", "a")],
          "rejected": [said("user", "q"), said("assistant", "b")]}, [ONE])],
    "messages-implicit": [
        ({"prompt": "q", "chosen": [said("user", "q"), said("assistant", "a")],
          "rejected": [said("user", "q"), said("assistant", "b")], "score_chosen": 8.5}, [ONE]),
        ({"chosen": [said("system", "s"), *MESSAGES, said("assistant", "a")],
          "rejected": [said("system", "s"), *MESSAGES, said("assistant", "b")]},
         [((Message("system", "s"), *DIALOGUE), A, B)]),
        ({"chosen": [said("user", "q"), said("assistant", "a"), said("function", "f"), said("assistant", "c")],
          "rejected": [said("user", "q"), said("assistant", "a")]},
         [(Q, (bot("a"), Message("observation", "f"), bot("c")), A)])],
    "alpaca": [
        ({"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, [ONE]),
        ({"instruction": "q", "input": "i", "system": "s", "history": [["q0", "a0"]], "chosen": "a", "rejected": "b"},
         [((Message("system", "s"), user("q0"), bot("a0"), user("q\ni")), A, B)]),
        ({"instruction": "q", "input": None, "history": [], "output": ["a", "b"]}, [ONE])],
    "sharegpt": [
        ({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
          "rejected": {"from": "gpt", "value": "b"}}, [ONE]),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"},
                            {"from": "function_call", "value": "f"}, {"from": "observation", "value": "o"}],
          "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
         [((Message("system", "s"), user("q"), bot("f"), Message("observation", "o")), A, B)])],
    "swift": [
        ({"messages": [*MESSAGES, said("assistant", "a")], "rejected_response": "b"}, [(DIALOGUE, A, B)]),
        ({"messages": [said("user", "q"), said("assistant", "a")], "rejected_response": ["b", "c"]},
         several(Q, "abc", [(0, 1), (0, 2)], prompt_id=1)),
        ({"messages": [said("user", "q"), said("assistant", "a")],
          "rejected_messages": [said("user", "q"), said("assistant", "b")]}, [ONE]),
        ({"messages": [said("user", "q"), said("assistant", "a")], "rejected_messages": [said("assistant", "b")]},
         [ONE])],
    "ranked": [
        ({"context": [said("user", "q")], "completions": [
            {"rank": 1, "completion": [said("assistant", "b")]}, {"rank": 0, "completion": [said("assistant", "a")]}]},
         [ONE]),
        ({"context": [said("user", "q")], "completions": [
            {"rank": rank, "completion": [said("assistant", text)]} for text, rank in zip("abc", (2, 0, 1))]},
         several(Q, "abc", [(1, 0), (2, 0), (1, 2)], prompt_id=1))],
    "answers": [
        ({"prompt": "q", "responses": ["b", "a"], "scores": [1, 2.5]}, [ONE]),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [3, 3]}, [("equally good answers", 1)]),
        ({"prompt": "q", "responses": ["a", "b", "c", "d"], "scores": [1, 4, 4, 2]},
         [*several(Q, "abcd", [(1, 0), (2, 0), (3, 0), (1, 3), (2, 3)], prompt_id=1), ("equally good answers", 1)]),
        ({"prompt": "q", "responses": ["a", "b", "c"], "ranks": [0, 1, 2]},
         several(Q, "abc", [(0, 1), (0, 2), (1, 2)], prompt_id=2))],
    "pku-saferlhf": [
        ({"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": 1, "safer_response_id": 0,
          "is_response_0_safe": True, "is_response_1_safe": False}, [ONE])],
    "helpsteer3": [
        ({"context": MESSAGES, "response1": "a", "response2": "b", "overall_preference": -3}, [(DIALOGUE, A, B, 3.0)]),
        ({"context": [said("user", "q")], "response1": "b", "response2": "a", "overall_preference": 1},
         [(Q, A, B, 1.0)]),
        ({"context": [said("user", "q")], "response1": "b", "response2": "a", "overall_preference": 0},
         [("an overall_preference of 0", 1)])],
    "reward-bench": [
        ({"prompt": "q", "chosen": "a", "rejected": "b", "subset": "hep-python", "id": 7}, [ONE])],
    "reward-bench-2": [
        ({"prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"], "num_correct": 1, "total_completions": 4,
          "subset": "Math", "id": "1"}, several(Q, "abcd", [(0, 1), (0, 2), (0, 3)])),
        ({"prompt": "q", "chosen": ["a", "b"], "rejected": ["c"], "num_correct": 2, "total_completions": 3,
          "subset": "Ties", "id": "2"}, several(Q, "abc", [(0, 2), (1, 2)], prompt_id=1))],
}
