"""Facts about chapters/retrieval.py and chapters/facts.py: what is found, and what is answered."""

from collections import Counter
from math import log

import numpy as np
import pytest
import torch
from conftest import keep, mistake, tiny

from chapters import retrieval
from chapters.facts import (RELATIONS, draw_pairs, facts, find, is_held_out, ranks, strangers, tell,
                            train_reader, world_tokenizer)
from chapters.grammar import PEOPLE
from chapters.near import words
from chapters.retrieval import (BM25, Embeddings, Index, answer, contrastive_loss, crops, cut,
                                embed, prompt, reciprocal_ranks, train_encoder)
from evaluate import wilson
from sample import complete
from tokenizer import Tokenizer

PASSAGES = ["The bridge was built in 1904. It is old.", "A bridge, a bridge and a tower!",
            "The tower fell.", "Nobody lives at the lake, and the lake is deep.", "Old songs"]


@pytest.fixture(scope="module")
def vocabulary():
    return world_tokenizer()


@pytest.fixture(scope="module")
def encoder(vocabulary):
    """An encoder that learned nothing yet."""
    return tiny("bert", vocab_size=vocabulary.n_vocab, block_size=128)


# -----------------------------------------------------------------------------
# Passages and scores.


def test_passages_are_whole_sentences_or_lines_and_together_the_text():
    text = "One two. Three four five!\n\nsix\nseven eight nine ten eleven twelve. Thirteen."
    passages = cut(text, n_words=5)
    assert passages == ["One two. Three four five!", "six",
                        "seven eight nine ten eleven twelve.", "Thirteen."]
    assert cut(text, n_words=99) == [text] and cut(" \n ") == []
    assert "".join(passages).split() != [] and "".join("".join(passages).split()) == "".join(
        text.split())


@pytest.mark.parametrize("query", ["old bridge", "the lake lake", "BRIDGE?", "nothing shared", ""])
def test_bm25_is_the_sum_over_the_words_of_the_query_that_is_in_the_books(query):
    counts = [Counter(words(passage)) for passage in PASSAGES]
    mean = sum(own.total() for own in counts) / len(counts)

    def score(own):
        total = 0.0
        for word in words(query):
            df, f = sum(word in other for other in counts), own[word]
            rarity = log(1 + (len(counts) - df + 0.5) / (df + 0.5))
            total += rarity * f / (f + 1.5 * (0.25 + 0.75 * own.total() / mean))
        return total

    np.testing.assert_allclose(BM25(PASSAGES).scores(query), [*map(score, counts)])


def test_bm25_scores_as_the_library_bm25s_does():
    bm25s = pytest.importorskip("bm25s", reason="bm25s, the library to compare with, is missing")
    passages = [fact.passage for fact in facts(PEOPLE)]
    said = [[word.decode() for word in words(passage)] for passage in passages]
    theirs = bm25s.BM25(method="lucene", k1=1.2, b=0.6)
    theirs.index(said, show_progress=False)
    ours = BM25(passages, k1=1.2, b=0.6)
    for query in ("Where does Anna keep the dog?", "at home", "Boris collects red stamps"):
        known = [word for word in map(bytes.decode, words(query)) if word in {*sum(said, [])}]
        np.testing.assert_allclose(ours.scores(query), theirs.get_scores(known), rtol=1e-4)


def test_an_embedding_has_length_1_and_does_not_depend_on_the_texts_beside_it(encoder, vocabulary):
    long = " ".join(map(str, range(400)))
    texts = ["Anna", "Which pet does Anna keep?", "", long]
    together = embed(encoder, vocabulary, texts)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(together, torch.cat([embed(encoder, vocabulary, [text])
                                                    for text in texts]))
    torch.testing.assert_close(embed(encoder, vocabulary, [long[:1000]])[0], together[3])


def test_embeddings_score_by_the_cosine_and_a_passage_suits_itself_best(encoder, vocabulary):
    passages = [fact.passage for fact in facts(PEOPLE)[:70]]
    kind = Embeddings(passages, encoder, vocabulary)
    for i in (0, 69):
        scores = kind.scores(passages[i])
        assert scores.argmax() == i and scores.max() == pytest.approx(1, abs=1e-5)
        assert scores.shape == (70,) and (abs(scores) < 1 + 1e-5).all()


def test_an_index_gives_the_best_first_and_joins_several_by_their_ranks():
    class Backwards(BM25):
        def scores(self, query):
            return -super().scores(query)

    found = Index(PASSAGES).search("the old bridge", None)
    scores = BM25(PASSAGES).scores("the old bridge")
    assert [one.score for one in found] == sorted(scores, reverse=True)
    assert all(scores[n] == score and PASSAGES[n] == text for score, n, text in found)
    assert Index(PASSAGES).search("the old bridge", 2) == found[:2]
    twice = Index(PASSAGES, BM25, BM25).search("the old bridge", 1)[0]
    assert twice.number == found[0].number and twice.score == 2 / 61
    both = Index(PASSAGES, BM25, Backwards).search("the old bridge", None)
    expected = reciprocal_ranks(scores) + reciprocal_ranks(-scores)
    assert [one.score for one in both] == sorted(expected, reverse=True)
    with pytest.raises(ValueError, match="there is no passage to search"):
        Index([])


def test_ranks_are_places_from_1_on():
    numbers = [0, 1, 2]
    places = ranks(Index(PASSAGES), [PASSAGES[i] for i in numbers], numbers)
    assert places.tolist() == [1, 1, 1]
    assert ranks(Index(PASSAGES), ["zzz"] * 3, numbers).tolist() == [1, 2, 3]  # all alike


# -----------------------------------------------------------------------------
# The encoder's training.


def test_the_contrastive_loss_is_the_surprise_at_the_own_passage():
    q, p = torch.nn.functional.normalize(torch.randn(2, 5, 8), dim=-1)
    p_own = [torch.softmax(p @ q[i] / 0.1, dim=0)[i] for i in range(5)]
    torch.testing.assert_close(contrastive_loss(q, p, 0.1), -torch.stack(p_own).log().mean())
    assert contrastive_loss(q, q) < contrastive_loss(q, p)


def test_crops_are_halves_of_the_same_passage():
    passages = ["a b c d e f g", "h i j k", "l"]
    left, right = crops(passages)(torch.Generator().manual_seed(0))
    assert len(left) == len(right) == 3
    for one, other in zip(left, right):
        passage, = [passage for passage in passages if one in passage]
        n = (len(passage.split()) + 1) // 2
        assert other in passage and len(one.split()) == len(other.split()) == n


# -----------------------------------------------------------------------------
# Worlds.


def test_a_world_tells_each_answer_once_and_another_seed_tells_others(vocabulary):
    rows, others = facts(PEOPLE), facts(PEOPLE, seed=1)
    assert len({fact.question for fact in rows}) == len(rows) == len(PEOPLE) * len(RELATIONS)
    for fact in rows:
        assert fact.answer in fact.passage and fact.answer not in fact.question
        assert fact.person in fact.passage and fact.person in fact.question
    same = np.mean([a.answer == b.answer for a, b in zip(rows, others)])
    assert same < 0.25 and [a.question for a in rows] == [b.question for b in others]


def test_what_is_held_out_and_strangers_are_never_trained_on(vocabulary):
    held = {fact.question for fact in facts(PEOPLE) if is_held_out(fact)}
    drawn = [draw_pairs(torch.Generator().manual_seed(i)) for i in range(20)]
    assert held and not held & {question for questions, _ in drawn for question in questions}
    assert not {*strangers(24)} & {*PEOPLE} and len({*strangers(24)}) == 24
    assert all(len(vocabulary.encode(" " + name)) == 1 for name in PEOPLE)
    assert all(len(vocabulary.encode(" " + name)) > 1 for name in strangers(24))


# -----------------------------------------------------------------------------
# Answers.


def test_the_best_passage_stands_next_to_the_question_and_what_has_no_room_is_left_out(vocabulary):
    model = tiny(vocab_size=vocabulary.n_vocab, block_size=64)
    passages = [fact.passage for fact in facts(PEOPLE)[:20]]
    text = prompt(model, vocabulary, "Why?", passages[:2], "question", 8)
    assert text == f"Question: {passages[1]}\n{passages[0]}\nWhy?\nAnswer:"
    text = prompt(model, vocabulary, "Why?", passages, "text", 8)
    n = text.count("\n")
    assert 0 < n < 20 and text.split("\n") == [*passages[:n][::-1], "Why?"]
    longer = "\n".join([passages[n], text])
    assert len(vocabulary.encode(text)) <= 56 < len(vocabulary.encode(longer))


@pytest.mark.parametrize("template", ["question", "chat", "text"])
def test_an_answer_is_what_the_model_continues_the_passages_and_the_question_with(template,
                                                                                  vocabulary):
    model = tiny(vocab_size=vocabulary.n_vocab, block_size=64)
    content = "\n".join([*[one.text for one in Index(PASSAGES).search("tower", 2)][::-1], "tower"])
    asked = {"text": content, "question": f"Question: {content}\nAnswer:",
             "chat": vocabulary.render_prompt([dict(role="user", content=content)])}[template]
    expected = complete(model, vocabulary, asked, temperature=0, max_new_tokens=6).strip()
    assert answer(model, vocabulary, Index(PASSAGES), "tower", k=2, template=template,
                  max_new_tokens=6) == expected


@pytest.mark.slow
def test_meaning_finds_other_words_words_find_strangers_and_a_reader_tells_what_was_found(
        vocabulary):
    encoder, reader = train_encoder(vocabulary, draw_pairs), train_reader(vocabulary)
    first = {name: {who: (places == 1).mean() for who, places in row.items()}
             for name, row in find(vocabulary, encoder).items()}
    assert first["embeddings"]["known names"] > 0.8 > 0.6 > first["words"]["known names"]
    assert first["words"]["strangers"] > first["embeddings"]["strangers"]
    assert all(first["both"][who] > first["words"][who] + 0.2 for who in first["both"])
    right = tell(vocabulary, encoder, reader)
    share = {name: wilson(own.mean(), len(own)) for name, own in right.items()}
    assert share["no passage"][1] < 0.3 < share["words"][1] < share["both"][0]
    assert share["the right passage"][0] > 0.75


# -----------------------------------------------------------------------------
# The command.


@pytest.fixture
def notes(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("The bridge was built in 1904.\nA tower stands beside it.\nThe lake is deep.\n")
    return path


def test_the_command_prints_passages_with_their_scores_and_lets_a_run_answer(
        call, notes, tmp_path, vocabulary):
    model, run = tiny(vocab_size=vocabulary.n_vocab, block_size=96), tmp_path / "run"
    keep(model, run)
    vocabulary.save(run / "tokenizer.json")
    shown, error = call(retrieval, notes, "--question=When was the bridge built?", "--k=2",
                        "--n_words=6", f"--run={run}", "--max_new_tokens=5")
    passages = ["The bridge was built in 1904.", "A tower stands beside it.", "The lake is deep."]
    index = Index(passages)
    (first, *_), (second, *_) = found = index.search("When was the bridge built?", 2)
    reply = answer(model, vocabulary, index, "When was the bridge built?", 2, max_new_tokens=5)
    assert shown == (f"{first:.4g}  passage 1 of 3\n{found[0].text}\n\n"
                     f"{second:.4g}  passage 3 of 3\n{found[1].text}\n\nanswer: {reply}\n")


@pytest.mark.slow
def test_the_command_finds_a_passage_by_its_meaning_too(call, notes):
    shown, error = call(retrieval, notes, "--question=bridge", "--by=both", "--n_words=6", "--k=1")
    assert "passage 1 of 3\nThe bridge was built in 1904." in shown and not error


@pytest.mark.parametrize("words, message", [
    ([], "give files, and what you want to know as --question=TEXT"),
    (["notes.txt"], "give files, and what you want to know"),
    (["notes.txt", "--question=x", "--by=sense"], "unknown by 'sense'"),
    (["notes.txt", "--question=x", "--template=chat"], "would not act without --run=RUN"),
    (["notes.txt", "--question=x", "--run=nowhere"], "there is no run folder nowhere"),
    (["nowhere.txt", "--question=x"], "nowhere.txt: no such file"),
    (["empty.txt", "--question=x"], "there is no passage to search"),
    (["empty.txt", "--question=x", "--by=both"], "there is no passage to search")])
def test_a_mistake_is_one_line(words, message, notes, monkeypatch, capsys):
    (notes.parent / "empty.txt").write_text(" \n")
    monkeypatch.chdir(notes.parent)
    code, lines = mistake(retrieval.main, monkeypatch, capsys, *words)
    assert code in (1, 2) and len(lines) == 1 and message in lines[0]
