"""A backend with `submit` that is right: files as of `sound`, moved by two threads, the last submitted first."""

import threading

from sound import Sound, plugin

import flexkv_core.backend as fk


class SoundSubmit(Sound):
    def open(self, context):
        super().open(context)
        self.todo, self.changed, self.closed = [], threading.Condition(), False
        self.workers = [threading.Thread(target=self.work, daemon=True) for _ in range(2)]
        for worker in self.workers:
            worker.start()

    def submit(self, operation, batch, done):
        with self.changed:
            self.todo.append((operation, batch, done))
            self.changed.notify()

    def work(self):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.todo or self.closed)
                if self.closed:
                    return
                operation, batch, done = self.todo.pop()
            self.finish(operation, batch, done)

    def finish(self, operation, batch, done):
        one = self.read_one if operation == "read" else self.write_one
        done([one(*block) for block in self.blocks(batch)])

    def read(self, batch):
        return fk.submit_and_wait(self, "read", batch)

    def write(self, batch):
        return fk.submit_and_wait(self, "write", batch)

    def close(self):
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        for worker in self.workers:
            worker.join()
        super().close()


flexkv_backend = plugin("sound_submit", SoundSubmit)
