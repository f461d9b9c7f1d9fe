import pytest

from dualrefnet.analysis.audit import audit_split
from dualrefnet.analysis.duplicates import fingerprint_files
from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.protocols import split_dataset
from dualrefnet.report.trust import QUESTIONS, audited_section


@pytest.fixture(scope="module")
def dataset(sample_root):
    return load_dataset("sample", sample_root)


def test_every_finding_has_a_question_and_the_worst_verdict_answers_it(dataset):
    audit = audit_split(
        dataset, split_dataset(dataset), fingerprint_files(dataset.with_image), forests=False, samples=20
    )
    asked = [check for _, checks in QUESTIONS for check in checks]
    assert {finding.check for finding in audit.findings} <= {*asked, "images_compared"}
    section = audited_section(audit)
    verdicts = section.items[0]
    answers = {row[0].text: row[1].text for row in verdicts.rows}
    assert answers["Are patients on one side only?"] == "yes"
    assert answers["Does no single column give the class away?"] == "not quite"
    assert len(answers) == len(QUESTIONS)
    assert "120 images" in section.lead[0]
    assert "0 forbid believing the numbers" in section.lead[0]
    assert len(section.items) == 4
    assert verdicts.notes[0].startswith("120 of 120 images were compared")
    assert all(item.markdown() for item in section.items)


def test_a_failure_stands_in_the_lead(dataset):
    split = split_dataset(dataset)
    split["split"] = ["train", "test", "val"] * 40
    section = audited_section(audit_split(dataset, split, forests=False, samples=20))
    assert any("of the test images show a patient that is also in train" in sentence for sentence in section.lead)
    answers = {row[0].text: row[1] for row in section.items[0].rows}
    assert answers["Are patients on one side only?"].text == "no"
    assert answers["Are patients on one side only?"].bold
    assert "Are copies of a photograph on one side only?" not in answers
    assert section.items[0].notes == ("Photographs were not compared with each other.",)
