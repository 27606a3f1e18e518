"""Readers of the releases that data_pipeline.convert takes: an annotation file in, samples and problems out.

    vision_flan   annotation_191-task_1k.json, vision_flan.json, and the Vision-Flan site's earlier schema
    llava         LLaVA-Instruct (conversation_58k, detail_23k, complex_reasoning_77k, 150k), llava_v1_5_mix665k and
                  anything else of that form, text-only and multi-image samples included
    llava_plain   pictures with captions: blip_laion_cc_sbu_558k.json, CC3M's chat.json, and their metadata.json
    scienceqa     problems.json with pid_splits.json beside it
    auto          one of these, by the keys of the first records

The first three are read from one JSON array or from JSON lines, whatever the file is called. llava.py and scienceqa.py
say how a record becomes a sample, json_stream.py how a file of any length is cut into records.
"""

from data_pipeline.releases.release import FORMATS, OPTIONS, Option, Release, open_release

__all__ = ["FORMATS", "OPTIONS", "Option", "Release", "open_release"]
