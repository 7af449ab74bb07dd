# The study, from models and data to the report.
#
#   results/shared/                 models, datasets and tokens, shared by all studies
#   results/{study}/runs/           one folder per run: how it ended, its steps, its weights
#   results/{study}/evaluations/    one folder per run: accuracy and every prediction
#   results/{study}/facts/          one folder per captured run: phases, operators, communication
#   results/{study}/tables/         runs.csv and what is computed from it
#   results/{study}/figures/        every figure as svg, pdf and png
#   results/{study}/report.html     the report, one file
from snakemake.utils import min_version

min_version("9.18")


configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/plan.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/capture.smk"
include: "workflow/rules/inference.smk"
include: "workflow/rules/report.smk"


localrules:
    all,


rule all:
    default_target: True
    input:
        study_results,
