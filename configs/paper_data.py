"""The paper's 8 + 8 domains (Gururangan et al. 2021, section 3), from the closest public text.

    demix prepare --config configs/paper_data.py --config.data.tokenizer=GPT2/tokenizer.json
    demix train   --config configs/paper_125m.py --workdir runs/125m/demix ...

GPT2/tokenizer.json is GPT-2's, of 50,257 tokens. `paper_125m.py` to `paper_1300m.py` train on what
the first command leaves in runs/paper/data. Eleven domains are TFDS datasets, the others are files
that you put below domains/ first; docs/data.md, "The paper's sixteen domains", says for each how
close it is to the paper's, how large, under which terms and where to get it. To take a domain from
elsewhere, change its entry: do so for webtext and realnews, or build these two beforehand on a
cluster, for otherwise TFDS begins to read terabytes of Common Crawl here. Not run by this project.
"""

from demix_jax.config import Config, DataConfig

# Where a dataset names no valid or test split, they are slices of train.
TRAIN = {
    "1b": "tfds:lm1b:1.1.0?train=train[:99%]&valid=train[99%:]&test=test",
    "cs": "tfds:scientific_papers/arxiv:1.1.1?field=article&train=train&valid=validation&test=test",
    "legal": "domains/legal/*.jsonl.gz",
    "med": "tfds:scientific_papers/pubmed:1.1.1"
    "?field=article&train=train&valid=validation&test=test",
    "webtext": "tfds:c4/webtextlike:3.1.0?train=train[:99%]&valid=train[99%:]&test=validation",
    "realnews": "tfds:c4/realnewslike:3.1.0?train=train[:99%]&valid=train[99%:]&test=validation",
    "reddit": "tfds:reddit:1.0.0"
    "?field=body&train=train[:98%]&valid=train[98%:99%]&test=train[99%:]",
    "reviews": "domains/reviews/*.jsonl.gz",
}
NOVEL = {
    "acl_papers": "tfds:scrolls/qasper:1.0.0?field=input&train=train&valid=validation&test=test",
    "breaking_news": "tfds:multi_news:2.1.0?field=document&train=train&valid=validation&test=test",
    "contracts": "domains/contracts/*.txt",
    "cord19": "domains/cord19/*.jsonl.gz",
    "github": "domains/github/*.jsonl.gz",
    "gutenberg": "tfds:pg19:0.1.1?field=book_text&train=train&valid=validation&test=test",
    "tweets": "tfds:sentiment140:1.0.0?train=train[:90%]&valid=train[90%:95%]&test=train[95%:]",
    "yelp": "tfds:yelp_polarity_reviews:0.2.0?train=train[:95%]&valid=train[95%:]&test=test",
}


def get_config() -> Config:
    """Returns the experiment described above."""
    return Config(
        data=DataConfig(
            dir="runs/paper/data",
            sources=tuple(f"{name}={place}" for name, place in (TRAIN | NOVEL).items()),
            train_domains=tuple(TRAIN),
            novel_domains=tuple(NOVEL),
            tokenizer="tokenizer.json",
        ),
    )
