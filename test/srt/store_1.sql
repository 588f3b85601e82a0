BEGIN TRANSACTION;
CREATE TABLE checkpoints (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    job_id TEXT NOT NULL REFERENCES jobs (id),
    created_at INTEGER NOT NULL,
    step INTEGER NOT NULL,
    name TEXT NOT NULL,
    directory TEXT NOT NULL,
    metrics TEXT NOT NULL,
    UNIQUE (job_id, step)
);
INSERT INTO "checkpoints" VALUES(1,'ftckpt_0123456789abcdef01234567','ftjob-0123456789abcdef01234567',1700000005,5,'mine:ckpt-step-5','run/checkpoint-5','{"step": 5}');
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    job_id TEXT NOT NULL REFERENCES jobs (id),
    created_at INTEGER NOT NULL,
    level TEXT NOT NULL,
    message TEXT NOT NULL,
    type TEXT NOT NULL,
    data TEXT NOT NULL
);
INSERT INTO "events" VALUES(1,'ftevent-0123456789abcdef01234567','ftjob-0123456789abcdef01234567',1700000001,'info','Created fine-tuning job','message','{}');
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    status TEXT NOT NULL
);
INSERT INTO "files" VALUES(1,'file-0123456789abcdef01234567','rows.jsonl','fine-tune',14,1700000000,'processed');
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    created_at INTEGER NOT NULL,
    finished_at INTEGER,
    status TEXT NOT NULL,
    model TEXT NOT NULL,
    training_file TEXT NOT NULL,
    validation_file TEXT,
    seed TEXT NOT NULL,
    suffix TEXT,
    adapter_name TEXT NOT NULL,
    metadata TEXT NOT NULL,
    request TEXT NOT NULL,
    hyperparameters TEXT NOT NULL,
    config TEXT NOT NULL,
    fine_tuned_model TEXT,
    trained_tokens INTEGER,
    error TEXT NOT NULL,
    step INTEGER NOT NULL,
    version INTEGER NOT NULL
);
INSERT INTO "jobs" VALUES(1,'ftjob-0123456789abcdef01234567',1700000001,1700000009,'succeeded','opt','file-0123456789abcdef01234567',NULL,'18446744073709551615','mine','mine','{"team": "a"}','{"model": "opt", "suffix": "mine"}','{"n_epochs": 1, "batch_size": 16, "learning_rate_multiplier": 1.0}','{"learning_rate": 0.001, "target_modules": ["q_proj"], "objective": null}','opt:mine',123,'null',10,1);
CREATE INDEX jobs_by_status ON jobs (status, number);
CREATE INDEX events_by_job ON events (job_id, number);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('files',1);
INSERT INTO "sqlite_sequence" VALUES('jobs',1);
INSERT INTO "sqlite_sequence" VALUES('events',1);
INSERT INTO "sqlite_sequence" VALUES('checkpoints',1);
PRAGMA user_version = 1;
COMMIT;
