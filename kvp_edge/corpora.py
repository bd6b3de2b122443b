"""Which texts are for training and which for evaluation. No text is for both.

Training: traces (``kvp-edge trace`` and ``learn``), scripts/train_policy and scripts/train_model.
Evaluation: ``kvp-edge eval``, ``kvp-edge demo``, scripts/recall_eval and the figures of
scripts/train_model and scripts/train_policy.

The names are those of public collections, whose files a user may have in a folder:

- 100 English Novels (github.com/computationalstylistics/100_english_novels), one file each, named
  here without ``.txt``;
- chats and meetings, of which each collection of several files is divided; questions, all of which
  are for evaluation.

Files with other names are the user's own, and belong to whatever the user gives them to.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

_TRAINING_BOOKS = """
    Anon_Clara_1864 Barclay_Ladies_1917 Barclay_Postern_1911 Barclay_Rosary_1909
    Bennet_Babylon_1902 Bennet_Helen_1910 Bennet_Imperial_1930 Blackmore_Erema_1877
    Blackmore_Lorna_1869 Blackmore_Springhaven_1887 Braddon_Audley_1862 Braddon_Phantom_1883
    Braddon_Quest_1871 Burnett_Lord_1886 Burnett_Princess_1905 Cbronte_Jane_1847
    Cbronte_Shirley_1849 Cbronte_Villette_1853 Chesterton_Innocence_1911
    Chesterton_Napoleon_1904 Conrad_Almayer_1895 Conrad_Nostromo_1904 Conrad_Rover_1923
    Corelli_Innocent_1914 Corelli_Romance_1886 Corelli_Satan_1895 Dickens_Bleak_1853
    Dickens_Expectations_1861 Dickens_Oliver_1839 Doyle_Lost_1912 Doyle_Micah_1889
    Eliot_Adam_1859 Eliot_Daniel_1876 Ford_Girl_1907 Ford_Post_1926 Ford_Soldier_1915
    Forster_Angels_1905 Forster_Howards_1910 Galsworthy_Man_1906 Galsworthy_River_1933
    Galsworthy_Saints_1919 Gaskell_Lovers_1863 Gaskell_Ruth_1855 Gaskell_Wives_1865
    Gissing_Unclassed_1884 Gissing_Warburton_1903 Gissing_Women_1893 Haggard_Mines_1885
    Haggard_She_1887 Haggard_Sheallan_1921 Hardy_Jude_1895 Hardy_Tess_1891
    James_Ambassadors_1903 James_Roderick_1875 James_Tragic_1890 Kipling_Captains_1896
    Kipling_Kim_1901 Kipling_Light_1891 Lawrence_Peacock_1911 Lawrence_Serpent_1926
    Lawrence_Women_1920 Lee_Albany_1884 Lee_Brown_1884 Lee_Penelope_1903 Lytton_Kenelm_1873
    Lytton_Novel_1853 Lytton_What_1858 Meredith_Feverel_1859 Meredith_Marriage_1895
    Meredith_Richmond_1871 Morris_Roots_1890 Morris_Water_1897 Morris_Wood_1894
    Schreiner_Farm_1883 Schreiner_Trooper_1897 Schreiner_Undine_1929 Stevenson_Arrow_1888
    Stevenson_Catriona_1893 Thackeray_Esmond_1852 Thackeray_Pendennis_1850
    Thackeray_Virginians_1859 Trollope_Angel_1881 Trollope_Phineas_1869 Trollope_Warden_1855
    Ward_Ashe_1905 Ward_Harvest_1920 Ward_Milly_1881 Wcollins_Basil_1852 Wcollins_Legacy_1889
    Woolf_Lighthouse_1927 Woolf_Night_1919 Woolf_Years_1937
"""

_EVALUATION_BOOKS = """
    Burnett_Garden_1911 Chesterton_Thursday_1908 Doyle_Hound_1902 Eliot_Felix_1866
    Forster_View_1908 Hardy_Madding_1874 Stevenson_Treasure_1883 Wcollins_Woman_1860
"""

#: Novels to train on.
TRAINING_BOOKS = frozenset(_TRAINING_BOOKS.split())

#: Novels to measure on, spread over the collection: one of each of eight authors.
EVALUATION_BOOKS = frozenset(_EVALUATION_BOOKS.split())

# What follows names files of a data folder.

#: Plain texts.
BOOK_FILES = "books/*.txt"

#: To measure on: one pattern for each collection of chats, OpenAssistant, Topical-Chat and
#: Taskmaster-4.
DIALOGUE_FILES = (
    "dialogue/oasst_en100/en_100_tree.jsonl",
    "dialogue/topical_chat/conversations/test_*.json",
    "dialogue/taskmaster4/data/data_0[67].json",
)

#: To train on: Topical-Chat and Taskmaster-4.
TRAINING_DIALOGUE_FILES = (
    "dialogue/topical_chat/conversations/valid_*.json",
    "dialogue/taskmaster4/data/data_0[0-5].json",
)

#: QMSum, to measure on and to train on.
MEETING_FILES = "meetings/qmsum/test.jsonl"
TRAINING_MEETING_FILES = "meetings/qmsum/val.jsonl"

#: Natural Questions with their paragraphs, of "Lost in the Middle".
QUESTION_FILE = "qa/lost_in_the_middle/qa_data/nq-open-oracle.jsonl.gz"

#: Its objects of 75 and of 140 pairs.
PAIR_FILES = {
    n: f"qa/lost_in_the_middle/kv_retrieval_data/kv-retrieval-{n}_keys.jsonl.gz" for n in (75, 140)
}

#: The bundled prose (kvp_edge/data/), and the novels that it comes from.
TRAINING_PROSE = "training_prose.txt"
TRAINING_PROSE_BOOKS = ("Ward_Milly_1881", "Gaskell_Wives_1865", "Braddon_Audley_1862")
EVALUATION_PROSE = "prose.txt"
EVALUATION_PROSE_BOOKS = ("Stevenson_Treasure_1883",)


def training_prose() -> str:
    """What traces hide their facts in: the openings of three novels."""
    return _bundled(TRAINING_PROSE)


def evaluation_prose() -> str:
    """The bundled novel, which evaluation and demo hide their facts in."""
    return _bundled(EVALUATION_PROSE)


def for_training(path: str | Path) -> bool:
    """Whether a file may be trained on: it is none of the books for evaluation."""
    return Path(path).stem not in EVALUATION_BOOKS


def for_evaluation(path: str | Path) -> bool:
    """Whether a file may be measured on: it is none of the books for training."""
    return Path(path).stem not in TRAINING_BOOKS


def _bundled(name: str) -> str:
    return (resources.files("kvp_edge") / "data" / name).read_text(encoding="utf-8")
