"Run notebooks and keep what they show, but no warnings or progress bars: python tests/execute.py NOTEBOOK …"
import os
import sys

import nbformat
from nbclient import NotebookClient

from cramlit.running.pipeline import is_noise

if __name__ == '__main__':
    os.environ['TQDM_DISABLE'] = '1'
    for path in sys.argv[1:]:
        nb = nbformat.read(path, as_version=4)
        where = dict(metadata=dict(path=os.path.dirname(path) or '.'))
        NotebookClient(nb, kernel_name='python3', resources=where).execute()
        for cell in nb.cells:
            if cell.cell_type == 'code': cell.outputs = [o for o in cell.outputs if not is_noise(o)]
        nb.metadata.pop('widgets', None)  # the state of progress bars that are gone
        nbformat.write(nb, path)
        print(path)
