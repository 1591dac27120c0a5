"Run chapters and keep what they show, without warnings and progress bars: python tests/execute.py nbs/06_model.ipynb …"
import os
import sys

import nbformat
from nbclient import NotebookClient


def noise(output) -> bool:
    "Is this a warning, or a bar of a library that does not ask TQDM_DISABLE?"
    return output.get('name') == 'stderr' or '%|' in output.get('data', {}).get('text/plain', '')


if __name__ == '__main__':
    os.environ['TQDM_DISABLE'] = '1'
    for path in sys.argv[1:]:
        nb = nbformat.read(path, as_version=4)
        NotebookClient(nb, kernel_name='python3', resources=dict(metadata=dict(path=os.path.dirname(path)))).execute()
        for cell in nb.cells:
            if cell.cell_type == 'code': cell.outputs = [o for o in cell.outputs if not noise(o)]
        nbformat.write(nb, path)
        print(path)
